"""A run's config: the schema, and the strict reading of a YAML file into it."""

from dude_cli.config.read import dump_config, load_config, resolved
from dude_cli.config.schema import (
    DTYPES,
    AdapterConfig,
    Config,
    DataConfig,
    DataSource,
    DType,
    EvalConfig,
    EvalTask,
    Method,
    ModelConfig,
    Section,
    SvdConfig,
    TrainConfig,
)

__all__ = [
    "DTYPES",
    "AdapterConfig",
    "Config",
    "DType",
    "DataConfig",
    "DataSource",
    "EvalConfig",
    "EvalTask",
    "Method",
    "ModelConfig",
    "Section",
    "SvdConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
    "resolved",
]
