"""Names of the files of a run directory and of a sweep's folder, for all who write and read them."""

#: The job itself: its state, its environment, its configuration, its log, its metrics.
STATUS, ENVIRONMENT, CONFIG, LOG, METRICS = "status.json", "env.json", "config.resolved.yaml", "run.log", "metrics.json"
#: Locked by the process that works in the directory.
LOCK = ".lock"
#: Output of a sweep's job that runs beside others.
CONSOLE = "console.txt"
#: Hydra's record of a job, a folder, and in it the job's configuration, Hydra's own, and the overrides.
HYDRA = ".hydra"
HYDRA_JOB, HYDRA_CONFIG, HYDRA_OVERRIDES = (f"{HYDRA}/{part}.yaml" for part in ("config", "hydra", "overrides"))

#: Of calib collect.
ACTIVATIONS, METADATA, STATISTICS = "activations.h5", "collection_metadata.json", "layer_statistics.json"
#: Of calib convergence.
CONVERGENCE_PLOT = "convergence.png"

#: Of calib analyze: the plan, the part of it that varies with the step, a summary for people.
PLAN, STEPS, SUMMARY = "quantization_config.json", "timestep_config.json", "analysis.txt"

#: Of calib quantize: the folder of the quantized model, and the file in it that describes the others.
MODEL = "quantized"
MODEL_CONFIG = f"{MODEL}/config.json"

#: Of calib evaluate: a table for people, details by prompt, a plot, a grid of pictures, and folders of the single
#: pictures, 0000.png …, in the order of the prompts.
FIDELITY, DETAILS = "evaluation.txt", "evaluation.json"
ERROR_PLOT, PICTURE_GRID = "images/output_error.png", "images/pictures.png"
FULL_PICTURES, QUANTIZED_PICTURES = "images/full", "images/quantized"
#: All of these; they are about the one quantized model of the directory.
EVALUATION = (FIDELITY, DETAILS, ERROR_PLOT, PICTURE_GRID, FULL_PICTURES, QUANTIZED_PICTURES)

#: Pages: of a run, of a sweep.
PAGE, COMPARISON_PAGE = "report.html", "comparison.html"

#: What each stage makes in a run directory, in their order: what one makes is made from what those before it made.
PRODUCTS = {
    "generate": (),
    "collect": (ACTIVATIONS, METADATA, STATISTICS, CONVERGENCE_PLOT),
    "analyze": (PLAN, STEPS, SUMMARY),
    "quantize": (MODEL,),
    "evaluate": EVALUATION,
}
#: Products whose checksums ``status.json`` records, the one that may be large last.
CHECKED = (METADATA, STATISTICS, PLAN, STEPS, MODEL_CONFIG, DETAILS, METRICS, ACTIVATIONS)
#: Where a job writes while the directory holds the results of an earlier one, and the record of their exchange.
NEXT, EXCHANGE = ".next", ".exchange.json"
#: In a sweep's folder: the names of its jobs' folders, those of jobs not begun included.
SWEEP = "sweep.json"
