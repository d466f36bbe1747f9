"""A run's config: the schema, and the strict reading of a YAML file into it."""

from dude_cli.config.read import dump_config, load_config, resolved
from dude_cli.config.schema import (
    DTYPES,
    QUANTIZATIONS,
    AdapterConfig,
    Config,
    DataConfig,
    DataSource,
    Distributed,
    DType,
    EvalConfig,
    EvalTask,
    Method,
    ModelConfig,
    Quantization,
    Section,
    SvdConfig,
    TrainConfig,
)

__all__ = [
    "DTYPES",
    "QUANTIZATIONS",
    "AdapterConfig",
    "Config",
    "DType",
    "DataConfig",
    "DataSource",
    "Distributed",
    "EvalConfig",
    "EvalTask",
    "Method",
    "ModelConfig",
    "Quantization",
    "Section",
    "SvdConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
    "resolved",
]
