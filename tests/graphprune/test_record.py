"""Records: what is stored comes back, and their order of merit."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from graphprune.plan import Choice, Plan
from graphprune.record import Record, Share

numbers = st.floats(allow_nan=False, allow_infinity=False)
samples = st.lists(numbers, max_size=5).map(tuple)
texts = st.text(max_size=10)
shares = st.builds(Share, numbers, numbers, numbers, samples, samples, texts)
plans = st.builds(
    Plan,
    texts,
    st.just(()) | st.just((Choice("conv1/channels", "filter", "1/2", (0, 5)),)),
    st.just((("float32", (3, 8, 8)),)),
)
records = st.builds(
    Record,
    plan=plans,
    accuracy=st.none() | numbers,
    feasible=st.booleans(),
    predicted=st.dictionaries(texts, numbers, max_size=3),
    measured=st.none() | shares,
    flops=st.integers(0, 2**60),
    params=st.integers(0, 2**60),
    error=st.none() | texts,
    agent=texts,
    seed=st.integers(0, 2**32),
    seconds=numbers,
    environment=st.dictionaries(texts, texts, max_size=3),
)


@given(records)
def test_round_trip_is_exact_and_byte_stable(record: Record) -> None:
    again = Record.from_json(record.to_json())
    assert again == record
    assert again.to_json() == record.to_json()


def test_raw_samples_come_back_as_they_were() -> None:
    share = Share(0.5, 0.49, 0.51, (0.1 + 0.2, 1e-300), (1 / 3,), "onnxruntime 1.31, 1 threads")
    record = Record.from_json(Record(Plan("m"), measured=share).to_json())
    assert record.measured == share
    assert isinstance(record.measured.dense, tuple)


def test_rank_puts_feasible_first_then_accuracy_and_failures_last() -> None:
    plan = Plan("m")
    ordered = [
        Record(plan, error="out of memory"),
        Record(plan, accuracy=0.5),
        Record(plan, accuracy=0.99),
        Record(plan, accuracy=0.1, feasible=True),
        Record(plan, accuracy=0.2, feasible=True),
    ]
    for worse, better in pairwise(ordered):
        assert worse.rank < better.rank


def test_a_feasible_record_that_failed_is_no_candidate() -> None:
    assert Record(Plan("m"), feasible=True, error="boom").rank < Record(Plan("m"), accuracy=0.0).rank
