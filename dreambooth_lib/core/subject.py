"""Define what a run learns: the subject's photos and the words that name it."""

import os
from dataclasses import dataclass
from pathlib import Path

from dreambooth_lib.core.config_checks import check_words
from dreambooth_lib.core.config_types import take_types
from dreambooth_lib.core.user_text import folder_name

#: The default identifier. CLIP's tokenizer and toybox's both make it a single token.
DEFAULT_IDENTIFIER = "ohwx"


@dataclass(frozen=True)
class Subject:
    """A subject: its photos, the rare identifier that names it, and its class noun.

    The prompts are the paper's (arXiv 2208.12242, section 3.1): ``a [identifier] [class noun]``
    for the subject and ``a [class noun]`` for the class.
    """

    photos: str  #: a folder or a zip of photos, or one photo
    class_noun: str  #: what the subject is, in one plain word: "dog", "teapot"
    identifier: str = DEFAULT_IDENTIFIER  #: a rare word that the tokenizer makes a single token
    name: str = ""  #: for tables and folders; the name of the photos' folder if left empty
    kind: str = ""  #: "live" or "object", if a data set says so
    #: files in ``photos`` to go on without, such as a damaged photo
    left_out: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        take_types(self, "subject.")
        if not self.name:
            place = Path(self.photos)
            named = place if place.stem not in ("", "..") else Path(os.path.realpath(place))
            object.__setattr__(self, "name", folder_name(named.stem))
        check_words(self)

    @property
    def token(self) -> str:
        """Return identifier and class noun, which stand for the subject in a prompt."""
        return f"{self.identifier} {self.class_noun}"

    @property
    def instance_prompt(self) -> str:
        return f"a {self.token}"

    @property
    def class_prompt(self) -> str:
        return f"a {self.class_noun}"
