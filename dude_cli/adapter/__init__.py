"""The method, usable on any transformers model without the CLI.

patch_model(model, AdapterConfig(method="dude", rank=16))  # in place
...                                                        # train what `trainable_parameters(model)` names
save_adapter(model, folder)
load_adapter(fresh_base_model, folder)
"""

from dude_cli.adapter.casting import cast_model
from dude_cli.adapter.decomposition_cache import DecompositionCache
from dude_cli.adapter.factors import Factors
from dude_cli.adapter.folder import SavedAdapter, read_adapter_config
from dude_cli.adapter.layer import AdapterLayer
from dude_cli.adapter.movement import LayerMovement, layer_movement, movements
from dude_cli.adapter.patch import (
    adapter_layers,
    check_ranks,
    constant_adapters,
    disable_adapters,
    find_targets,
    merge_adapter,
    patch_model,
    patch_with_factors,
    smaller_than_rank,
    target_names,
    trainable_parameters,
    unpatch_model,
)
from dude_cli.adapter.state import (
    check_base,
    check_factors,
    keep_fingerprint,
    load_adapter,
    restore_adapter,
    save_adapter,
)
from dude_cli.config import AdapterConfig, SvdConfig

__all__ = [
    "AdapterConfig",
    "AdapterLayer",
    "DecompositionCache",
    "Factors",
    "LayerMovement",
    "SavedAdapter",
    "SvdConfig",
    "adapter_layers",
    "cast_model",
    "check_base",
    "check_factors",
    "check_ranks",
    "constant_adapters",
    "disable_adapters",
    "find_targets",
    "keep_fingerprint",
    "layer_movement",
    "load_adapter",
    "merge_adapter",
    "movements",
    "patch_model",
    "patch_with_factors",
    "read_adapter_config",
    "restore_adapter",
    "save_adapter",
    "smaller_than_rank",
    "target_names",
    "trainable_parameters",
    "unpatch_model",
]
