"""Pretrain the embedded quickstart's model from a seed: `python tools/pretrain_quickstart.py`.

Trains a BPE tokenizer and a small Llama on the generated corpus of `dude_cli.quickstart.corpus`, all kinds
of rows mixed from the first step and annealed together, and writes both as Hugging Face files. The same seed,
steps, threads and versions give the same model.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dude_cli.quickstart import MODEL_DIR
from dude_cli.quickstart.corpus import FIRST_ROWS, pretraining_rows

VOCAB_SIZE = 640
SEQUENCE_TOKENS = 256
SEQUENCES_PER_BATCH = 8
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
PROMPT_WEIGHT = 0.2  # most of a prompt is names and numbers that cannot be foretold; its words must still be learned
LOG_STEPS = 100

WeightedIds = tuple[list[int], list[float]]  # a row's token ids, and how much the loss of each counts


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the corpus: single digits, nothing unknown, no token added to a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (row["prompt"] + row["completion"] for row in itertools.islice(pretraining_rows(seed), FIRST_ROWS + 20_000))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model: 4 layers of width 128, about 0.9 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def packs(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[WeightedIds]]:
    """Give endless sequences of rows that fit `SEQUENCE_TOKENS` together."""
    pack: list[WeightedIds] = []
    for row in pretraining_rows(seed):
        prompt, completion = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        # A lone letter would drown among the digits of the calculations if each token counted the same.
        target_weight = (len(completion) + 1) ** -0.5
        weights = [PROMPT_WEIGHT / len(prompt)] * len(prompt) + [target_weight] * (len(completion) + 1)
        if sum(len(other) for other, _ in pack) + len(ids) > SEQUENCE_TOKENS:
            yield pack
            pack = []
        pack.append((ids, weights))


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Give endless batches of packed rows; no row attends to another, and each starts at position 0."""
    sequences = packs(tokenizer, seed)
    shape = (SEQUENCES_PER_BATCH, SEQUENCE_TOKENS)
    earlier = torch.ones(SEQUENCE_TOKENS, SEQUENCE_TOKENS, dtype=torch.bool).tril()
    while True:
        ids = torch.full(shape, tokenizer.pad_token_id)
        weights = torch.zeros(shape)
        positions, row_numbers = torch.zeros(2, *shape, dtype=torch.long)
        for line, pack in enumerate(itertools.islice(sequences, SEQUENCES_PER_BATCH)):
            start = 0
            for number, (row, row_weights) in enumerate(pack, 1):
                end = start + len(row)
                ids[line, start:end] = torch.tensor(row)
                weights[line, start + 1 : end] = torch.tensor(row_weights[1:])  # nothing foretells the first
                positions[line, start:end] = torch.arange(len(row))
                row_numbers[line, start:end] = number
                start = end
        same_row = row_numbers[:, None, :, None] == row_numbers[:, None, None, :]
        yield {
            "input_ids": ids,
            "weights": weights,
            "position_ids": positions,
            "attention_mask": same_row & earlier,
        }


def schedule(step: int, steps: int) -> float:
    """Give the share of the peak learning rate: linear warm-up, then linear decay to zero."""
    return min((step + 1) / WARMUP_STEPS, (steps - step) / max(1, steps - WARMUP_STEPS))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int) -> None:
    """Train on the weighted mean of the tokens' losses: the layers' matrices by Muon, the rest by AdamW."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    )
    rates = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: schedule(step, steps)) for each in optimizers]
    start, tokens = time.monotonic(), 0
    for step, batch in enumerate(itertools.islice(batches(tokenizer, seed), steps), 1):
        weights, targets = batch.pop("weights")[:, 1:].flatten(), batch["input_ids"][:, 1:].flatten()
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        tokens += batch["input_ids"].numel()
        if step % LOG_STEPS == 0 or step == steps:
            seconds = time.monotonic() - start
            speed = f"{tokens / seconds:.0f} tokens/s  {seconds:.0f} s"
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {speed}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--threads", type=int, default=2, help="the last bits of the weights depend on it")
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.seed)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, arguments.seed, arguments.steps)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
