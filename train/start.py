"""From a recipe to a trained model: its source of batches, then the kind of run that it asks for."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..model import Transformer
from . import own
from .data.conversations import ChatSource, lacking
from .data.corpus import load_corpus
from .data.planted import PlantedSource, planted_task
from .data.source import Source, TextSource, maps, open_tokenizer
from .data.tokenizers import ByteTokenizer, Tokenizer, bpe_size, load_tokenizer
from .distributed.world import World, check, choose_device, processes
from .reason.distil import DistilRun
from .reason.grpo import GrpoRun
from .reason.source import ReasonSource
from .recipe import Recipe, check_vocabulary
from .run import checkpoint, folder, metrics, provenance
from .run.loop import Run, Summary
from .run.stop import Stopped, noted
from .settings import PLANTED, ChatConfig


def train(
    recipe: Recipe,
    out: Path | str | None,
    resume: Path | str | None = None,
    stop_at: int | None = None,
    shown: bool = True,
    prepare: Callable[[Transformer], None] | None = None,
    signals: bool = False,
) -> Summary:
    """Trains `recipe` in folder `out`, from the start or from the checkpoint (or newest of the run) `resume`.

    Paths of the recipe are kept from the root on, so that the run can be read from any folder.

    `out` None is a new folder runs/NAME-DATE-TIME. A run that was killed before its first checkpoint starts over when
    it is resumed. Keys of the recipe that a resumed run has changed are told, a line each, and kept in run.json.

    `stop_at` ends the run early after that step, with a checkpoint, as if it had been interrupted there. `prepare` may
    change the model as soon as it is built: an experiment's variant of it. A model that it has built otherwise goes on,
    and is opened, with that code alone; where train.prepare names it, it is found again. With `signals`, Ctrl-C and
    SIGTERM let a run of one process finish its step and save a checkpoint; several processes end where they are.

    Raises:
        Stopped: a signal ended the run so.
        FileExistsError: `out` holds a run and this is no resumption of it.
        BlockingIOError: another process writes a run there.
        ValueError: the checkpoint's model, tokenizer, rules or kind of run are others, or it is broken, or later
            checkpoints lie in `out`.
        TrainingDiverged: a loss, a gradient norm or an evaluation is not finite; the message names the step.
        OSError: a full disk, say, or ProcessLost: another process of the run ended or did not answer (a note says how
            to go on), or FolderLost: the folder was moved or removed meanwhile.
    """
    recipe = recipe.with_absolute_paths()
    device, settings, run = choose_device(recipe.train.device), recipe.train, None
    try:
        with processes(device, settings.expert_parallel, settings.process_timeout) as world:
            check(recipe, world)
            with folder.written(Path(out) if out else None, recipe.name, world) as (place, held):
                run = _run(recipe, place, _start(resume, place), shown, prepare, world, held)
                try:
                    with noted(signals and world.size == 1) as run.asked:
                        run.loop(stop_at or settings.steps)
                finally:
                    run.close()
                return run.finish()
    except (KeyboardInterrupt, OSError) as error:  # of which ProcessLost is one
        if run and not isinstance(error, folder.FolderLost | Stopped):
            found = checkpoint.checkpoints(run.out)
            last = f"the last checkpoint is {found[-1].name if found else 'none'}"
            error.add_note(f"{last}: go on with --resume {shlex.quote(str(run.out))}")
        raise


def _start(resume: Path | str | None, out: Path) -> Path | None:
    """The checkpoint to go on from; None for a new run, or for one in `out` that never had any."""
    if resume is None:
        return None
    if Path(resume).resolve() == out.resolve() and never_saved(out):
        (out / metrics.FILE).unlink(missing_ok=True)
        return None
    return checkpoint.find(resume)


def never_saved(run: Path) -> dict[str, Any] | None:
    """The recipe of the run in that folder if it ended before its first checkpoint.

    Raises:
        FileNotFoundError: it has had one that is out of reach: moved away, on a disk that is not there, or not whole.
    """
    begun = provenance.recipe(run)
    if begun is None or checkpoint.checkpoints(run):
        return None
    recipe, parent, saved = Recipe.from_dict(begun), run / checkpoint.FOLDER, provenance.saved(run)
    if saved is None:
        due = 0 if recipe.stability else recipe.train.checkpoint_every or recipe.train.steps
        saved = (run / metrics.FILE).exists() and any(record["step"] > due for record in metrics.read(run)[-1:])
    if saved or (parent.is_symlink() and not parent.exists()) or [*parent.glob("step-*")]:
        raise FileNotFoundError(
            f"{str(parent)!r}: its checkpoints are out of reach, or not whole: put them back, or resume another's"
        )
    return begun


def _run(
    recipe: Recipe,
    out: Path,
    start: Path | None,
    shown: bool,
    prepare: Callable[[Transformer], None] | None,
    world: World,
    held: Callable[[], None],
) -> Run:
    """A run of the kind that the recipe asks for; where its tokenizer is gone, the checkpoint has one."""
    gone = start is not None and _is_path(recipe.data.tokenizer) and not Path(recipe.data.tokenizer).exists()
    source = open_source(recipe, checkpoint.tokenizer_of(start)) if start and gone else open_source(recipe)
    if recipe.rollouts is not None:
        kind = GrpoRun if recipe.grpo else DistilRun
        return kind(recipe, source, out, start, shown, prepare, held)
    return Run(recipe, source, out, start, shown, prepare, world, held)


def _is_path(tokenizer: str) -> bool:
    return tokenizer != ByteTokenizer.name and bpe_size(tokenizer) is None


def open_source(recipe: Recipe, tokenizer: Tokenizer | None = None, test: bool = False) -> Source:
    """The source that a recipe names, in the tokens of data.tokenizer, or of the one that is given.

    `test`: all its conversations are held out, as it is not trained on.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its tokens do not fit into the model's vocabulary.
    """
    if recipe.reason is not None:
        return ReasonSource(recipe)
    data, seed = recipe.data, recipe.train.seed
    if data.source.startswith(PLANTED):
        name = data.source.removeprefix(PLANTED)
        code = own.digest(name) if own.is_own(name) else ""
        return PlantedSource(planted_task(data.source, recipe.planted), data, seed, code)
    if recipe.chat is not None:
        return _chat_source(recipe, recipe.chat, tokenizer or load_tokenizer(data.tokenizer), test)
    corpus = load_corpus(data.source, data.held_out_fraction, not maps(data), data.text_key)
    tokenizer = tokenizer or open_tokenizer(data.tokenizer, corpus)
    _check_tokens(recipe, tokenizer)
    return TextSource(corpus, tokenizer, data, seed)


def _chat_source(recipe: Recipe, chat: ChatConfig, tokenizer: Tokenizer, test: bool) -> ChatSource:
    data, missing = recipe.data, lacking(tokenizer)
    if missing:
        raise ValueError(f"{missing}: give a model whose tokenizer has them")
    _check_tokens(recipe, tokenizer)
    least = max(tokenizer.special.values()) + 1
    if recipe.model.vocab_size < least:
        raise ValueError(
            f"model.vocab_size={recipe.model.vocab_size}: allowed with [chat] is at least {least}, which holds the"
            f" special tokens of the chat format, for data.tokenizer={data.tokenizer!r}"
        )
    lengths = {stage.sequence_length or data.sequence_length for stage in recipe.stages} or {data.sequence_length}
    return ChatSource(data, chat, tokenizer, recipe.train.seed, lengths, test)


def _check_tokens(recipe: Recipe, tokenizer: Tokenizer) -> None:
    ids = tokenizer.bos, tokenizer.eos, tokenizer.pad
    check_vocabulary(recipe.model, recipe.data.tokenizer, tokenizer.least, *ids)
