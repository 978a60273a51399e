"""Check what users name things, quote it for Python and Markdown, and leave out what is private."""

import getpass
import json
import os
import re
from pathlib import Path, PurePath

_MOST_BYTES = 200  # of a word in UTF-8; a file's name may have 255, with the kit's own additions
_MOST_BYTES_OF_PATH = 4000
#: Names of devices, which Windows allows for no file, whatever their suffix.
_RESERVED = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{port}{n}" for port in ("COM", "LPT") for n in "123456789"),
}
#: What Markdown and HTML would take for their own; an underscore only at the edge of a word.
_MARKUP = re.compile(
    r"[\\`*\[\]<>&|~@$=]|^[#+\-]|(?<=:)//|(?<=www)\.|(?<![^\W_])_|_(?![^\W_])", re.IGNORECASE
)

#: What the tokens of some services look like.
TOKEN = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|AKIA|AIza|xox[a-z]-)[\w-]{8,}(\.[\w-]+)*")
#: In an environment variable's name; "PWD" by itself is the working folder.
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|_PWD|CREDENTIAL", re.IGNORECASE)
#: On Windows a user's name may have spaces; it then ends at the next separator.
_HOME = re.compile(
    r"(?i:[a-z]:|/[a-z])(?P<sep>[\\/]+)(?i:Users)(?P=sep)[^\\/:'\"\n]*[^\\/:'\"\s](?=(?P=sep))"
    r"|(?:/home/|/Users/|(?i:[a-z]:[\\/]+Users[\\/]+))[^\\/\s'\"]+"
)
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")


def short_path(path: str | Path) -> str:
    """Return a path relative to the working directory if it lies inside, else as it is."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def problem_with_words(text: str) -> str | None:
    """Say what keeps a text from being a noun or a name, as the rest of a sentence; None if fit.

    It has to be visible, on one line, and short.
    """
    if not text.strip():
        return "is empty; give a word such as 'dog'."
    if odd := next((c for c in text if not c.isprintable()), None):
        return f"contains the invisible character U+{ord(odd):04X}; retype it without it."
    if (size := len(text.encode())) > _MOST_BYTES:
        return f"is {size} bytes long; use {_MOST_BYTES} or fewer."
    return None


def problem_with_name(text: str) -> str | None:
    """Say what keeps a text from being the name of a folder on any system; None if it is fit."""
    if problem := problem_with_words(text):
        return problem
    if re.search(r"[/\\]", text) or text in (".", ".."):
        return f"is {text!r}, which leads to another folder; give a name without a path."
    if text.partition(".")[0].strip().upper() in _RESERVED:
        return f"is {text!r}, which is reserved on Windows; give another name."
    return None


def problem_with_path(text: str) -> str | None:
    """Say what keeps a text from being a path that a config can hold; None if it is fit."""
    if "\0" in text:
        return "has the character U+0000, which no path has; remove it."
    if re.search("[\ud800-\udfff]", text):
        return "is not UTF-8; rename the folder."
    parts = [len(part.encode()) for part in PurePath(text).parts]
    if max(parts, default=0) > 255 or sum(parts) > _MOST_BYTES_OF_PATH:
        size = sum(parts)
        return f"is a path of {size} bytes, longer than file systems allow; shorten its names."
    return None


def folder_name(text: str) -> str:
    """Make a name that is fit for a folder on any system, changing no more than is needed."""
    text = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in text)
    text = text.encode()[:_MOST_BYTES].decode(errors="ignore")
    if not text.strip() or text in (".", ".."):
        return "subject"
    return f"_{text}" if problem_with_name(text) else text


def python_string(text: object) -> str:
    """Quote a text as a Python string in double quotes, on one line."""
    quoted = json.dumps(str(text), ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in quoted)


def markdown(text: object) -> str:
    """Escape a text such that Markdown shows it as it is, on one line, in a table's cell too."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "\ufffd" for c in line)
    return _MARKUP.sub(lambda found: "".join(f"\\{c}" for c in found[0]), line)


def without_private(text: str) -> str:
    """Return a text without tokens, logins in addresses, home folders and this user's name."""
    secrets = [value for name, value in os.environ.items() if _SECRET.search(name)]
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= 8:
            text = text.replace(secret, "[hidden]")
    text = _LOGIN.sub("", TOKEN.sub("[hidden]", text))
    for home in (Path.home(), Path.home().resolve()):
        if len(home.parts) > 1:  # some containers have "/"
            parts = [re.escape(part.strip("\\/")) for part in home.parts]
            written = r"[\\/]+".join(parts) + r"(?!\w)"  # with either slash, or Python's two
            text = re.sub(written, "~", text, flags=re.IGNORECASE)
    text = _HOME.sub("~", text)
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # of a process whose number has no user
        return text
    alone = rf"(?<![^\W_]){re.escape(user)}(?![^\W_])"
    return text if user == "root" else re.sub(alone, "[user]", text)
