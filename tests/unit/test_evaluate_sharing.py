"""Which rank answers which question of an evaluation, and how many at once."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import lm_eval.utils
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dude_cli.config import EvalTask, ModelConfig
from dude_cli.errors import ResourceError
from dude_cli.evaluation import EvalRequest, evaluate
from dude_cli.evaluation.harness import shared_out
from dude_cli.model import load_model, load_tokenizer

QUICKSTART = ModelConfig(name_or_path="embedded:quickstart", dtype="float32")
TASKS = (EvalTask(name="quickstart_choices", limit=4), EvalTask(name="quickstart_problems", limit=4))

REQUESTS = st.lists(
    st.builds(SimpleNamespace, task_name=st.sampled_from(["a", "b"]), doc_id=st.integers(0, 9)), max_size=60
)


@given(requests=REQUESTS, count=st.integers(1, 5))
def test_each_document_goes_to_one_rank_and_no_rank_has_more_than_one_more(requests, count):
    shares = shared_out(requests, count)
    assert sorted(number for share in shares for number in share) == list(range(len(requests)))
    owners = Counter(
        rank
        for rank, share in enumerate(shares)
        for _ in {(requests[number].task_name, requests[number].doc_id) for number in share}
    )
    documents = {(request.task_name, request.doc_id) for request in requests}
    assert sum(owners.values()) == len(documents)
    assert max((owners[rank] for rank in range(count)), default=0) <= -(-len(documents) // count)


def test_out_of_memory_an_evaluation_goes_on_with_half_of_the_batch(monkeypatch):
    model, tokenizer = load_model(QUICKSTART), load_tokenizer(QUICKSTART)
    whole = evaluate(model, tokenizer, EvalRequest(TASKS, batch_size=2))
    most, ours, said = 3, model.forward, []

    def forward(input_ids, **more):
        if len(input_ids) > most:
            raise MemoryError
        return ours(input_ids, **more)

    monkeypatch.setattr(model, "forward", forward)
    halved = evaluate(model, tokenizer, EvalRequest(TASKS, batch_size=8), log=said.append)
    assert halved["results"] == whole["results"]
    assert halved["config"]["batch_size"] == 2  # as recorded, and for the tasks that follow
    assert [line for line in said if "memory" in line] == [
        f"out of memory: from now on {size} prompts per forward" for size in (4, 2)
    ]
    most = 0
    with pytest.raises(ResourceError, match="out of memory, with one prompt at a time too"):
        evaluate(model, tokenizer, EvalRequest(TASKS, batch_size=2))


def test_an_evaluation_compiles_each_template_once(monkeypatch):
    """And once more when the task is loaded."""
    compiled = []
    environment = type(lm_eval.utils.env)
    ours = environment.from_string

    def from_string(env, source, **settings):
        compiled.append(source)
        return ours(env, source, **settings)

    monkeypatch.setattr(environment, "from_string", from_string)
    evaluate(load_model(QUICKSTART), load_tokenizer(QUICKSTART), EvalRequest(TASKS[:1], batch_size=4))
    assert 0 < len(compiled) <= 2 * len(set(compiled))
