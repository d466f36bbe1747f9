"""A run's config: the schema, and the strict reading of a YAML file into it or into another schema."""

from dude_cli.config.read import dump_config, find_file, load_config, load_sections, resolved
from dude_cli.config.schema import (
    DTYPES,
    QUANTIZATIONS,
    AdapterConfig,
    Config,
    DataConfig,
    DataSource,
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
    "EvalConfig",
    "EvalTask",
    "Method",
    "ModelConfig",
    "Quantization",
    "Section",
    "SvdConfig",
    "TrainConfig",
    "dump_config",
    "find_file",
    "load_config",
    "load_sections",
    "resolved",
]
