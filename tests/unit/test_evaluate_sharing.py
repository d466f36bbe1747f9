"""Which rank answers which question of an evaluation."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from dude_cli.evaluation.harness import shared_out

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
