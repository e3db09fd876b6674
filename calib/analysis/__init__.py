"""From statistics to a plan: how many bits each layer may have."""
