"""Names of the files of a run directory and of a sweep's folder, for all who write and read them."""

#: The job itself: its state, its environment, its configuration, its log, its metrics.
STATUS, ENVIRONMENT, CONFIG, LOG, METRICS = "status.json", "env.json", "config.resolved.yaml", "run.log", "metrics.json"
#: Locked by the process that works in the directory.
LOCK = ".lock"
#: Output of a sweep's job that runs beside others.
CONSOLE = "console.txt"
#: Hydra's own record of a job, a folder, and in it Hydra's configuration and the overrides of the job.
HYDRA = ".hydra"
HYDRA_CONFIG, HYDRA_OVERRIDES = f"{HYDRA}/hydra.yaml", f"{HYDRA}/overrides.yaml"

#: Of calib collect.
ACTIVATIONS, METADATA, STATISTICS = "activations.h5", "collection_metadata.json", "layer_statistics.json"
#: Of calib convergence.
CONVERGENCE_PLOT = "convergence.png"

#: Of calib analyze: the plan, the part of it that varies with the step, a summary for people.
PLAN, STEPS, SUMMARY = "quantization_config.json", "timestep_config.json", "analysis.txt"

#: Of calib quantize: the folder of the quantized model.
MODEL = "quantized"

#: Of calib evaluate: a table for people, details by prompt, a plot, a grid of pictures, and folders of the single
#: pictures, 0000.png …, in the order of the prompts.
FIDELITY, DETAILS = "evaluation.txt", "evaluation.json"
ERROR_PLOT, PICTURE_GRID = "images/output_error.png", "images/pictures.png"
FULL_PICTURES, QUANTIZED_PICTURES = "images/full", "images/quantized"
#: All of these; they are about the one quantized model of the directory.
EVALUATION = (FIDELITY, DETAILS, ERROR_PLOT, PICTURE_GRID, FULL_PICTURES, QUANTIZED_PICTURES)

#: Pages: of a run, of a sweep.
PAGE, COMPARISON_PAGE = "report.html", "comparison.html"
#: In a sweep's folder: the names of its jobs' folders, those of jobs not begun included.
SWEEP = "sweep.json"
