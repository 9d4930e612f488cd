"""Following a model at work: its modules by torch's hooks, ops and the numpy decoder's parts by the kernels' watch."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from ...kernels.watch import Watcher, watched


@contextmanager
def following(watcher: Watcher, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Tells the watcher of all that runs within: calls of these modules, and whatever `watched` tells of."""
    with ExitStack() as undo:
        for module in modules:
            begins = module.register_forward_pre_hook(lambda module, _: watcher.begins(module))
            ends = module.register_forward_hook(lambda module, *_: watcher.ends(module), always_call=True)
            undo.callback(begins.remove)
            undo.callback(ends.remove)
        undo.enter_context(watched(watcher))
        yield
