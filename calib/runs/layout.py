"""Names of the files of a run directory, for those who write it and those who only read it."""

STATUS, ENVIRONMENT, CONFIG, LOG, METRICS = "status.json", "env.json", "config.resolved.yaml", "run.log", "metrics.json"
PLAN, STEPS = "quantization_config.json", "timestep_config.json"
#: Of calib evaluate: details by prompt; the pictures one by one, 0000.png …, in the order of the prompts.
DETAILS, FULL, QUANTIZED = "evaluation.json", "images/full", "images/quantized"
#: Pages: of a run, of a sweep.
REPORT, COMPARISON = "report.html", "comparison.html"
#: In a sweep's folder: the names of its jobs' folders, of those too that were not begun.
SWEEP = "sweep.json"
#: Hydra's own record of a job.
HYDRA = ".hydra"
#: Held by the process that works in the directory.
LOCK = ".lock"
