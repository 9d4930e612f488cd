"""From a recipe to a trained model: its source of batches, then the kind of run that it asks for."""

from collections.abc import Callable
from pathlib import Path

from ..model import Transformer
from .data.corpus import load_corpus
from .data.planted import PlantedSource, planted_task
from .data.source import Source, TextSource, maps, open_tokenizer
from .distributed.world import ProcessLost, World, check, choose_device, processes
from .reason.loop import GrpoRun
from .reason.source import ReasonSource
from .recipe import Recipe, check_vocabulary
from .run import checkpoint, metrics, provenance
from .run.loop import Run, Summary
from .settings import PLANTED


def train(
    recipe: Recipe,
    out: Path | str,
    resume: Path | str | None = None,
    stop_at: int | None = None,
    shown: bool = True,
    prepare: Callable[[Transformer], None] | None = None,
) -> Summary:
    """Trains `recipe` in folder `out`, from the start or from the checkpoint (or newest of the run) `resume`.

    A run that was killed before its first checkpoint starts over when it is resumed.

    `stop_at` ends the run early after that step, with a checkpoint, as if it had been interrupted there. `prepare` may
    change the model as soon as it is built: an experiment's variant of it.

    Raises:
        FileExistsError: `out` holds a run and this is no resumption of it.
        ValueError: the checkpoint's model is another one, or later checkpoints lie in `out`.
        TrainingDiverged: a loss, a gradient norm or an evaluation is not finite; the message names the step.
        ProcessLost: another process of the run ended or did not answer.
    """
    device, settings = choose_device(recipe.train.device), recipe.train
    try:
        with processes(device, settings.expert_parallel, settings.process_timeout) as world:
            check(recipe, world)
            out = world.agree(Path(out))
            run = _run(recipe, out, _start(resume, out), shown, prepare, world)
            try:
                run.loop(stop_at or settings.steps)
            finally:
                run.close()
            return run.finish()
    except ProcessLost as lost:
        found = checkpoint.checkpoints(Path(out))
        last = f"{found[-1]}: go on with --resume {out}" if found else "none"
        raise ProcessLost(f"{lost}. The last checkpoint is {last}") from lost


def _start(resume: Path | str | None, out: Path) -> Path | None:
    """The checkpoint to go on from; None for a new run, or for one in `out` that never had any."""
    if resume is None:
        return None
    begun = Path(resume).resolve() == out.resolve() and (out / provenance.FILE).is_file()
    if begun and not checkpoint.checkpoints(out):
        (out / metrics.FILE).unlink(missing_ok=True)
        return None
    return checkpoint.find(resume)


def _run(
    recipe: Recipe,
    out: Path,
    start: Path | None,
    shown: bool,
    prepare: Callable[[Transformer], None] | None,
    world: World,
) -> Run:
    """A run of the kind that the recipe asks for."""
    source = open_source(recipe)
    if recipe.grpo is not None:
        return GrpoRun(recipe, source, out, start, shown, prepare)
    return Run(recipe, source, out, start, shown, prepare, world)


def open_source(recipe: Recipe) -> Source:
    """The source that a recipe names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its tokens do not fit into the model's vocabulary.
    """
    if recipe.reason is not None:
        return ReasonSource(recipe)
    data, seed = recipe.data, recipe.train.seed
    if data.source.startswith(PLANTED):
        return PlantedSource(planted_task(data.source, recipe.planted), data, seed)
    corpus = load_corpus(data.source, data.held_out_fraction, in_memory=not maps(data))
    tokenizer = open_tokenizer(data.tokenizer, corpus)
    check_vocabulary(recipe.model, data.tokenizer, tokenizer.bos)
    return TextSource(corpus, tokenizer, data, seed)
