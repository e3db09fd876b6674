"""Pages for people: a run's and a comparison's, each one file that opens offline."""
