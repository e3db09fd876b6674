"""Names of the files of a run directory, for those who write it and those who only read it."""

STATUS, ENVIRONMENT, CONFIG, LOG, METRICS = "status.json", "env.json", "config.resolved.yaml", "run.log", "metrics.json"
PLAN, STEPS = "quantization_config.json", "timestep_config.json"
#: Hydra's own record of a job.
HYDRA = ".hydra"
#: Held by the process that works in the directory.
LOCK = ".lock"
