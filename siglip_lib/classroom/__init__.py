"""What the notebooks use beside the model: pictures, timings, widgets, oracles, predictions, checks of exercises."""

from siglip_lib.classroom.compare import agree, between
from siglip_lib.classroom.curves import plot_curves
from siglip_lib.classroom.diagrams import draw_idea, draw_tower
from siglip_lib.classroom.exercises import check_exercise
from siglip_lib.classroom.machine import (
    Timing,
    device_report,
    kernel_times,
    measure,
    measure_together,
    package_version,
    spread_report,
)
from siglip_lib.classroom.oracles import import_timm, import_transformers
from siglip_lib.classroom.plots import (
    COLOURS,
    figure,
    picture,
    plot_histogram,
    plot_timeline,
    show,
    show_attention,
)
from siglip_lib.classroom.predictions import count_predictions, predict
from siglip_lib.classroom.sizes import Size, pick_size
from siglip_lib.classroom.widgets import attention_viewer, search_box

__all__ = [
    "COLOURS",
    "Size",
    "Timing",
    "agree",
    "attention_viewer",
    "between",
    "check_exercise",
    "count_predictions",
    "device_report",
    "draw_idea",
    "draw_tower",
    "figure",
    "import_timm",
    "import_transformers",
    "kernel_times",
    "measure",
    "measure_together",
    "package_version",
    "pick_size",
    "picture",
    "plot_curves",
    "plot_histogram",
    "plot_timeline",
    "predict",
    "search_box",
    "show",
    "show_attention",
    "spread_report",
]
