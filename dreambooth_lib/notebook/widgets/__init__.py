"""Show the library in a notebook, with ipywidgets 7.7.1 or newer.

Each widget makes or shows what the library also gives without it: a config, a run's training steps,
its validations, samples. A widget shows the error of a callback as a sentence. Its ``check()``, and
whatever depends on the widget, raises that error, so that no cell passes over it.
"""

from dreambooth_lib.core.notices import quiet
from dreambooth_lib.notebook.widgets.checkpoint_slider import CheckpointSlider
from dreambooth_lib.notebook.widgets.class_images import show_class_images
from dreambooth_lib.notebook.widgets.loaded_models import release_models
from dreambooth_lib.notebook.widgets.playground import GalleryEntry, Playground, compare_with_base
from dreambooth_lib.notebook.widgets.settings import SettingsPanel
from dreambooth_lib.notebook.widgets.subject import SubjectPanel
from dreambooth_lib.notebook.widgets.training import monitor

__all__ = [
    "CheckpointSlider",
    "GalleryEntry",
    "Playground",
    "SettingsPanel",
    "SubjectPanel",
    "compare_with_base",
    "monitor",
    "quiet",
    "release_models",
    "show_class_images",
]
