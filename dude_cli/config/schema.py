"""The schema of a config: what a YAML training recipe may say, with each field's meaning, type, range and default.

`load_config` in `read.py` reads a file into `Config` and reports every problem with its line. The descriptions
here are the reference documentation; `docs/config.md` is generated from them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from dude_cli.config.data_schema import DataConfig, DataSource
from dude_cli.config.section import Contradiction, PositiveInt, Section

# Far above any that trains, and below those with which a step of AdamW has no number in float32.
LearningRate = Annotated[float, Field(gt=0, le=1000)]
# Far outside of any that trains, and within those with which the start and the norms have numbers in float32.
LEAST_ALPHA, MOST_ALPHA = 1e-6, 1_000_000
Method = Literal["dude", "dora", "pissa", "lora"]
DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = get_args(DType)
Quantization = Literal["nf4", "int8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
Distributed = Literal["ddp", "fsdp"]
TrackerName = Literal["tensorboard", "wandb"]
TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a model or a data set
# What an adapter's tensors were made with; all else may change when a training continues from it.
ADAPTER_FIXED = ("method", "rank", "alpha", "rank_stabilized", "target_modules", "exclude_modules", "svd")


class ModelConfig(Section):
    name_or_path: str = Field(
        min_length=1,
        examples=["meta-llama/Llama-2-7b-hf"],
        description="Hub name or folder of the base model, or `embedded:quickstart` for the model in this package.",
    )
    revision: str | None = Field(None, description="Hub revision: a branch, a tag or a commit.")
    dtype: DType = Field(
        "bfloat16", description="Dtype of the frozen base weights. Adapters are always trained in float32."
    )
    attn_implementation: str | None = Field(
        None,
        description=(
            "Attention kernel as transformers names it: sdpa, eager, flash_attention_2, ...; null: its own choice, "
            "sdpa where the model can."
        ),
    )
    quantization: Quantization | None = Field(
        None,
        description=(
            "Keep the frozen base in fewer bits, through bitsandbytes (`pip install bitsandbytes`): nf4 is "
            "QLoRA's 4 bits, int8 is LLM.int8(); null: as its files are. `dtype` is what it multiplies in."
        ),
    )
    trust_remote_code: bool = Field(False, description="Allow Python code from the model's repository to run.")


class SvdConfig(Section):
    algorithm: Literal["auto", "exact", "randomized"] = Field(
        "auto",
        description=(
            "`exact`: to the rounding of float32; `auto`: exact up to a short side of 1024, or of twice the columns "
            "that `randomized` would look in, which are 6 times the rank by default."
        ),
    )
    iterations: int = Field(
        12,
        ge=2,
        description=(
            "Steps of the randomized algorithm, a block Krylov method: each adds half the rank, at least 16 columns, "
            "to the space in which it looks for the largest singular triplets."
        ),
    )


class AdapterConfig(Section):
    method: Method = Field(
        "dude",
        description="dude: SVD init and magnitude; pissa: SVD init; dora: magnitude; lora: neither.",
    )
    rank: PositiveInt = Field(16, description="Rank r of the trained factors; at most a target layer's min(in, out).")
    alpha: float | None = Field(
        None,
        ge=LEAST_ALPHA,
        le=MOST_ALPHA,
        description="The update is scaled by alpha / rank; alpha = rank (scaling 1) if not given.",
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        min_length=1,
        description=(
            "`all-linear` (without layers smaller than the rank), or module names (`q_proj`, `mlp.up_proj`) or regular "
            "expressions over full names."
        ),
    )
    exclude_modules: list[str] = Field(
        default_factory=lambda: ["lm_head"], description="Module names or regular expressions to leave alone."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the input of the learned difference, not of the base."
    )
    init_from: str | None = Field(
        None,
        min_length=1,
        description=(
            "Run or adapter folder to continue from, on the same base, with a new optimizer and schedule. It gives "
            f"what its tensors fix: {', '.join(ADAPTER_FIXED)}."
        ),
    )
    svd: SvdConfig = Field(default_factory=SvdConfig, description="How the SVD start is computed.")
    norm_gradient: Literal["detached", "exact"] = Field(
        "detached", description="Whether the backward pass differentiates through the row norms (DoRA, section 4.3)."
    )
    rank_stabilized: bool = Field(False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")

    @field_validator("init_from")
    @classmethod
    def _home_is_written_out(cls, folder: str | None) -> str | None:
        return None if folder is None else os.path.expanduser(folder)

    @property
    def has_svd_init(self) -> bool:
        return self.method in ("dude", "pissa")

    @property
    def has_magnitude(self) -> bool:
        return self.method in ("dude", "dora")

    @property
    def scaling(self) -> float:
        """The factor s of the update s B A: alpha / r, or alpha / sqrt(r) when rank-stabilised."""
        alpha = self.rank if self.alpha is None else self.alpha
        return float(alpha / (self.rank**0.5 if self.rank_stabilized else self.rank))


class TrainConfig(Section):
    learning_rate: LearningRate = Field(
        2.0e-5, description="Peak rate. SVD starts (dude, pissa) want about a tenth of LoRA's."
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Shape of the rate after the warm-up; cosine and linear fall to 0."
    )
    warmup_ratio: float = Field(
        0.03, ge=0, le=1, description="Share of the steps over which the rate rises from 0; never the last step."
    )
    num_train_epochs: float = Field(1.0, gt=0, le=10_000, description="Passes over the rows; `max_steps` replaces it.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps.")
    global_batch_size: PositiveInt = Field(32, description="Rows per optimizer step, over all ranks and micro-batches.")
    per_device_batch_size: PositiveInt | Literal["auto"] = Field(
        "auto", description="Rows per forward on one device. `auto` halves it when memory runs out."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of A and B; magnitudes have none.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay rate of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay rate of the second moment.")
    adam_epsilon: float = Field(1.0e-8, gt=0, description="AdamW's term against division by zero.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the gradient to this norm; null for no clipping.")
    gradient_checkpointing: bool = Field(True, description="Recompute activations in the backward pass to save memory.")
    logging_steps: PositiveInt = Field(1, description="Steps between two lines of metrics.jsonl.")
    eval_steps: PositiveInt | None = Field(
        None, description="Steps between two evaluation losses; null: before the first step and after the last."
    )
    save_steps: PositiveInt | None = Field(
        500, description="Steps between two checkpoints; null: none but the result, and one after a signal."
    )
    save_total_limit: PositiveInt = Field(2, description="Checkpoints to keep; older ones are deleted.")
    keep: Literal["best", "last"] | None = Field(
        None,
        description=(
            "Which adapter the run ends with: `best` is that of the lowest evaluation loss, the one before the first "
            "step included; `last` the last step's; null: best with early stopping, else last."
        ),
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after so many evaluations without a new lowest loss."
    )
    distributed: Distributed = Field(
        "ddp",
        description=(
            "What several ranks share: `ddp` the rows; `fsdp` the frozen base's weights too (FSDP2), of which each "
            "block is gathered when it is needed."
        ),
    )
    distributed_timeout_s: int = Field(
        1800,
        gt=0,
        le=10**8,
        description=(
            "How long a rank waits for another one before it gives up. The longest wait is for what one rank does for "
            "all, such as encoding the rows."
        ),
    )
    report_to: list[TrackerName] = Field(
        default_factory=list, description="Trackers beside metrics.jsonl; `wandb` is Weights & Biases."
    )

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with the adapter of its lowest evaluation loss."""
        return self.keep == "best" or (self.keep is None and self.early_stopping_patience is not None)

    def contradictions(self) -> Iterator[Contradiction]:
        if self.max_steps is not None and "num_train_epochs" in self.model_fields_set:
            yield (
                "`train.max_steps` and `train.num_train_epochs` both say how long to train: give one",
                ("max_steps", "num_train_epochs"),
            )
        if self.per_device_batch_size != "auto" and self.per_device_batch_size > self.global_batch_size:
            yield (
                f"`train.per_device_batch_size` ({self.per_device_batch_size}) is larger than "
                f"`train.global_batch_size` ({self.global_batch_size}), which counts the rows of all devices",
                ("per_device_batch_size", "global_batch_size"),
            )


class EvalTask(Section):
    name: str = Field(min_length=1, examples=["gsm8k"], description="lm-eval task or group, such as mmlu or gsm8k.")
    num_fewshot: int | None = Field(
        None,
        ge=0,
        description="Examples in the prompt; null: 5 for mmlu and gsm8k as papers report, else the task's own.",
    )
    limit: PositiveInt | None = Field(None, description="Score only the first so many questions of each (sub)task.")
    rows: Annotated[list[DataSource], Field(min_length=1)] | None = Field(
        None,
        description=(
            "Score these rows in place of a task of lm-eval's, which `name` then is not: the loss of their answers and "
            "the share that the model would give word for word. They are read as the training's rows are."
        ),
    )
    apply_chat_template: bool = Field(
        False,
        description=(
            "Ask in the tokenizer's chat template, each example as two turns; else in plain text, as papers do."
        ),
    )
    system_instruction: str | None = Field(
        None, min_length=1, description="What the system's message says, in front of the task's own description."
    )

    def contradictions(self) -> Iterator[Contradiction]:
        if self.system_instruction is not None and not self.apply_chat_template:
            yield (
                "`system_instruction` is a message of a chat: set `apply_chat_template: true` too",
                ("system_instruction",),
            )
        for key in ("num_fewshot", "apply_chat_template"):
            if self.rows is not None and getattr(self, key):
                yield f"`rows` are asked as the training's are, so `{key}` has no meaning beside them", (key, "rows")


class EvalConfig(Section):
    tasks: list[EvalTask] = Field(default_factory=list, description="What `dude eval` scores when no --task is given.")
    batch_size: PositiveInt = Field(8, description="Sequences per forward.")

    def contradictions(self) -> Iterator[Contradiction]:
        names = [task.name for task in self.tasks]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield f"`eval.tasks` names {name} twice, and a run keeps one result per task", (f"tasks.{index}.name",)


class Config(Section):
    """One run: the whole YAML file."""

    model: ModelConfig = Field(description="The base model, which stays as it is.")
    adapter: AdapterConfig = Field(default_factory=AdapterConfig, description="What is trained: method and size.")
    data: DataConfig = Field(description="The rows to learn from, and how they become text.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="How long, how fast, and what is kept.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="The benchmark scores that `dude eval` takes.")
    output_dir: str = Field("", description="The run folder; runs/<name of the config file> if not given.")
    seed: int = Field(42, ge=0, lt=2**32, description="Of the row order, the factors' random start, dropout.")

    @field_validator("output_dir")
    @classmethod
    def _home_is_written_out(cls, folder: str) -> str:
        return os.path.expanduser(folder)

    def contradictions(self) -> Iterator[Contradiction]:
        if self.data.validation is None:
            for key in ("eval_steps", "early_stopping_patience"):
                if getattr(self.train, key) is not None:
                    yield f"`train.{key}` needs `data.validation`", (f"train.{key}", "data.validation")
            if self.train.keep == "best":
                yield "`train.keep: best` needs `data.validation`", ("train.keep", "data.validation")
        if self.train.distributed == "fsdp" and self.model.quantization is not None:
            yield (
                "`train.distributed: fsdp` cannot shard the packed weights of `model.quantization`: give one",
                ("train.distributed", "model.quantization"),
            )
        if self.train.early_stopping_patience is not None and self.train.eval_steps is None:
            yield (
                "`train.early_stopping_patience` counts evaluations: give `train.eval_steps` too",
                ("train.early_stopping_patience", "train.eval_steps"),
            )
        if self.train.keep == "best" and self.train.eval_steps is None:
            yield (
                "`train.keep: best` chooses between evaluations: give `train.eval_steps` too",
                ("train.keep", "train.eval_steps"),
            )

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir)
