"""Names of the files of a run directory and of a sweep's folder, for those who write them and those who read them."""

#: The job itself: how it stands, where it ran, what it was asked, what it said, its figures.
STATUS, ENVIRONMENT, CONFIG, LOG, METRICS = "status.json", "env.json", "config.resolved.yaml", "run.log", "metrics.json"
#: Held by the process that works in the directory.
LOCK = ".lock"
#: What a job of a sweep prints that runs beside others.
CONSOLE = "console.txt"
#: Hydra's own record of a job.
HYDRA = ".hydra"

#: Of calib collect.
ACTIVATIONS, METADATA, STATISTICS = "activations.h5", "collection_metadata.json", "layer_statistics.json"
#: Of calib convergence.
CONVERGENCE_PLOT = "convergence.png"

#: Of calib analyze: the plan, what of it varies with the step, the summary that people read.
PLAN, STEPS, SUMMARY = "quantization_config.json", "timestep_config.json", "analysis.txt"

#: Of calib quantize: the folder of the quantized model.
MODEL = "quantized"

#: Of calib evaluate: the table that people read; details by prompt; a plot; a grid of pictures; the pictures one by
#: one, 0000.png …, in the order of the prompts.
FIDELITY, DETAILS = "evaluation.txt", "evaluation.json"
ERROR_PLOT, PICTURE_GRID = "images/output_error.png", "images/pictures.png"
FULL_PICTURES, QUANTIZED_PICTURES = "images/full", "images/quantized"
#: All of these: files and folders that speak of one quantized model, and of no other.
EVALUATION = (FIDELITY, DETAILS, ERROR_PLOT, PICTURE_GRID, FULL_PICTURES, QUANTIZED_PICTURES)

#: Pages: of a run, of a sweep.
PAGE, COMPARISON_PAGE = "report.html", "comparison.html"
#: In a sweep's folder: the names of its jobs' folders, of those too that were not begun.
SWEEP = "sweep.json"
