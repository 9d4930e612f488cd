"""Optimizers: which parameter learns by which rule (`rules`), the rules, and the learning rate of a step (`schedule`).

rules      parameter -> rule, and why          muon       matrices, orthogonalised momentum
adam       everything else                     balanced   V4.1's momentum for tables, embedding and head
rows       rules of tables kept in a store     observe    size and orthogonality of the updates
build      all of a model's, as one
"""

from .build import Optimizers, build_optimizer, parameter_groups, set_learning_rate
from .muon import Muon
from .observe import UpdateMeter
from .rows import RowAdam

__all__ = [
    "Muon",
    "Optimizers",
    "RowAdam",
    "UpdateMeter",
    "build_optimizer",
    "parameter_groups",
    "set_learning_rate",
]
