"""Views in a notebook over the library's own functions: ipywidgets 7.7.1 and newer.

Each is a widget to display, and makes or shows what the library has without it: a config, a run's
steps, its looks, samples. An error in a view's callback is shown there as a sentence, and raised by
its ``check()`` and by whatever depends on it, so that a cell cannot pass over it.
"""

from dreambooth_lib.core.notices import quiet
from dreambooth_lib.notebook.widgets.checkpoint_slider import CheckpointSlider
from dreambooth_lib.notebook.widgets.class_images import show_class_images
from dreambooth_lib.notebook.widgets.playground import Drawn, SideBySide, playground
from dreambooth_lib.notebook.widgets.settings import SettingsPanel
from dreambooth_lib.notebook.widgets.subject import SubjectPanel
from dreambooth_lib.notebook.widgets.training import monitor

__all__ = [
    "CheckpointSlider",
    "Drawn",
    "SettingsPanel",
    "SideBySide",
    "SubjectPanel",
    "monitor",
    "playground",
    "quiet",
    "show_class_images",
]
