"""Find interrupted runs and backups after a disconnect, and restore one."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path

from dreambooth_lib.core import background
from dreambooth_lib.core.config import TrainConfig
from dreambooth_lib.core.disk import require_room
from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.files import replacing_folder
from dreambooth_lib.core.user_text import short_path
from dreambooth_lib.data.images import listed
from dreambooth_lib.notebook.drive_compare import are_there, difference_to, has_base, hashes, noted
from dreambooth_lib.notebook.drive_copy_back import RestoreError, copy_back, list_files
from dreambooth_lib.notebook.drive_state import State, read_identity, read_state
from dreambooth_lib.training import runs
from dreambooth_lib.training.runs import Run, RunError

#: Said of a run that is resumed without comparing its photos.
_UNCOMPARED = (
    "Its photos were not compared; for other photos set RESUME = False and run from there."
)


@dataclass(frozen=True)
class FoundRun:
    """A run or its backup, and how far it has come."""

    run: Run
    identity: str  #: shared by a run and its backups
    step: int  #: of its newest checkpoint, from which it resumes
    finished: bool
    last_saved: datetime

    def __str__(self) -> str:
        progress = f"step {self.step} of {self.run.config.steps}"
        saved = f"last saved {self.last_saved:%Y-%m-%d %H:%M} UTC"
        return f"{short_path(self.run.folder)}: {progress}, {saved}"


def restore(folder: str | Path, local: str | Path) -> Run:
    """Restore a backup and its photos to ``local``, a new folder; return the run.

    Its config then names the photos that came with it. Raises :class:`RunError` if there is no run
    or ``local`` is not empty, and :class:`RestoreError` if a file cannot be read or written;
    nothing is left in ``local`` then.
    """
    folder, local = Path(folder), Path(local).resolve()
    if local.exists() and any(local.iterdir()):
        raise RunError(f"{local} is not empty; restore the run to a new folder.")
    try:
        files = background.call(list_files, folder, place=folder, limit=background.ANSWER_LIMIT)
        require_room(local, sum(files.values()))
        with replacing_folder(local) as partial:
            copy_back(folder, list(files), partial, local)
        return runs.resume(local)
    except KitError:
        raise
    except Exception as error:  # whatever a damaged file raises
        raise RestoreError(
            f"{folder} could not be restored to {local} ({error or type(error).__name__}); check "
            "that the drive is mounted, and try again."
        ) from error


def find_interrupted(
    resume: bool | str,
    folders: Sequence[str | Path | None],
    photos: str | Path | None,
    class_noun: str,
    base: str,
    left_out: Collection[str] = (),
) -> tuple[FoundRun | None, str]:
    """Return the newest unfinished run of these photos, noun and base, and a sentence on it.

    If there is none, or ``resume`` is False, the run is None and the sentence says which runs are
    not resumed, and why. If ``resume`` is a run's name, it is that run, whatever it was trained
    on, and finished or not; raises ``RunError`` if there is none of that name. Of a run and its
    backups it is the one that is furthest, or else the one in the earlier folder. Folders that are
    None or missing, as Drive may be, are skipped, and so is the comparison of photos that are None,
    or missing as after a disconnect. Those that are named in ``left_out``, and those that a run has
    left out, are not compared.
    """
    named = isinstance(resume, str)
    found, silent = _all_runs(folders)
    message = "".join(
        f"{folder} did not answer within {background.ANSWER_LIMIT:.0f} seconds, so runs there were "
        "skipped; check that its drive is mounted, and run this again.\n"
        for folder in silent
    )
    known = sorted({found_run.run.folder.name for found_run in found})
    if named and resume not in known:
        quoted = [repr(name) for name in known]
        one_of = "one of " if len(known) > 1 else ""
        others = f"{one_of}{listed(quoted)}, or to True" if known else "True"
        raise RunError(f"{message}there is no run named {resume!r}; set RESUME to {others}.")
    skipped = ""
    wanted = [run for run in found if resume and (named or not run.finished)]
    for run in sorted(wanted, key=lambda run: run.last_saved, reverse=True):
        name = run.run.folder.name
        asked = photos, class_noun, base, left_out
        difference = "" if named else difference_to(run.run, *asked)
        if name == resume or not (named or difference):
            message += f"{'Opening finished' if run.finished else 'Resuming'} {run}"
            return run, message if named or are_there(photos) else f"{message}\n{_UNCOMPARED}"
        hint = f"set RESUME = {name!r} to resume it."
        skipped += f"Not resumed: {run}; {difference}; {hint}\n"
    names = sorted({found_run.run.folder.name for found_run in found if found_run.finished})
    if names and resume is True:
        opened = (
            f"set RESUME = {names[0]!r} to open it"
            if len(names) == 1
            else ("set RESUME to one of these names to open it")
        )
        quoted = [repr(name) for name in names]
        skipped += f"Finished runs here: {listed(quoted)}; {opened}.\n"
    return None, f"{message}{skipped}Starting a new run."


def fetch(found: FoundRun, folder: str | Path, drive: str | Path | None = None) -> Run:
    """Return a run that is in ``folder``, or :func:`restore` its backup there.

    It keeps its name, unless another run in ``folder`` has it: then it gets one that neither
    ``folder`` nor ``drive`` has.
    """
    run, folder = found.run, Path(folder).absolute()
    if run.folder.parent == folder:
        return run
    name = run.folder.name
    if (folder / name).exists():
        name = unique_name(name, folder, drive)
    return restore(run.folder, folder / name)


def may_resume(folder: Path, resume: bool | str, base: str) -> bool:
    """Return whether the run in a folder is unfinished and, by its name or base, to be resumed."""
    run = None if isinstance(resume, str) else _read_run(folder)
    named = folder.name == resume or (resume and run is not None and has_base(run.run, base))
    return bool(named) and not has_finished(folder)


def has_finished(folder: Path) -> bool:
    """Return whether the run in a folder, or the run that it backs up, has finished.

    A backup may lack the pipeline that a run ends with; its state says whether the run finished.
    """
    if (state := read_state(folder)) is not None and state.finished:
        return True
    run = _read_run(folder)
    return (folder / "pipeline").exists() if run is None else run.finished


def begun_with(config: TrainConfig, folder: Path) -> str | None:
    """Return the name of the newest unfinished run in a folder that has a config's photos, if any.

    It is one that the config can resume.
    """
    photos = hashes(config.subject)
    for found in sorted(_runs_in(folder), key=lambda run: run.last_saved, reverse=True):
        begun = found.step > 0 and not found.finished and noted(found.run) in (None, photos)
        if begun and runs.why_not_resumable(config, found.run.folder) is None:
            return found.run.folder.name
    return None


def unique_name(name: str, *folders: str | Path | None) -> str:
    """Return the name, with a number if these folders have a folder or a zip of that name."""
    places = [Path(folder) for folder in folders if folder is not None]
    names = {path.name for place in places for path in _contents_in_time(place)}
    taken = names | {name.removesuffix(".zip") for name in names}
    numbered = (f"{name}-{number}" for number in count(2))
    return next(free for free in chain([name], numbered) if free not in taken)


def _all_runs(
    folders: Sequence[str | Path | None],
) -> tuple[list[FoundRun], list[Path]]:
    """Return every run in these folders once, and the folders that do not answer.

    Of a run and its backups it is the furthest; of equal ones that with the further goal.
    """
    copies: dict[str, list[FoundRun]] = {}
    silent = []
    for folder in [Path(folder) for folder in folders if folder is not None]:
        try:
            for run in background.call(
                _runs_in, folder, place=folder, limit=background.ANSWER_LIMIT
            ):
                copies.setdefault(run.identity, []).append(run)
        except background.NoAnswerError:
            silent.append(folder)
    return [max(copied, key=_how_far) for copied in copies.values()], silent


def _how_far(found: FoundRun) -> tuple[int, int, bool, datetime]:
    return found.step, found.run.config.steps, found.finished, found.last_saved


def _runs_in(folder: Path) -> list[FoundRun]:
    return [run for place in _contents(folder) if (run := _read_run(place)) is not None]


def _contents(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # a missing folder, or a drive that is gone
        return []


def _contents_in_time(folder: Path) -> list[Path]:
    try:
        return background.call(_contents, folder, place=folder, limit=background.ANSWER_LIMIT)
    except background.NoAnswerError:  # then a backup there says so, or that it finds another run
        return []


def _read_run(folder: Path) -> FoundRun | None:
    try:
        run = runs.resume(folder)
        state = read_state(folder) or State()
        files = [file for name in ("config.toml", "log.jsonl") if (file := folder / name).exists()]
        # Drive sets its own file times, so a backup's state has those of the run.
        times = [rows[0][2] if (rows := state.parts.get(file.name)) else file.stat().st_mtime_ns
                 for file in files]  # fmt: skip
        return FoundRun(
            run,
            identity=read_identity(folder) or str(folder),
            step=max(run.checkpoints(), default=0),
            finished=run.finished or state.finished,
            last_saved=datetime.fromtimestamp(max(times) / 1e9, UTC),
        )
    except Exception:  # not a run, or damaged in any way: it must not hide the other runs
        return None
