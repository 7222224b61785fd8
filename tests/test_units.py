import pytest
from hypothesis import given
from hypothesis import strategies as st

from horizon.errors import ConfigError
from horizon.units import GIB, KIB, MIB, TIB, align_up, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (1000, 1000), ("1000", 1000), ("1000b", 1000), ("24GiB", 24 * GIB), ("24 gib", 24 * GIB), ("24g", 24 * GIB),
        ("1.5k", 1536), ("512MB", 512_000_000), ("512MiB", 512 * MIB), (" 2 TiB ", 2 * TIB), ("0.5tb", 500_000_000_000),
        ("1kb", 1000), ("3KiB", 3 * KIB),
    ],
)  # fmt: skip
def test_sizes_people_write(text, num_bytes):
    assert parse_bytes(text, "memory.host_budget") == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "0", "0GiB", "0.0001b", "-1GiB", "1e9", "1,5GiB", "24 GiB free", "24GX", "auto"]
)
def test_what_is_no_size_is_refused_by_its_key(text):
    with pytest.raises(ConfigError) as error:
        parse_bytes(text, "memory.host_budget")
    expected = f"memory.host_budget={text!r} is not a size; expected 'auto' or a number with a unit, such as 24GiB"
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (MIB - 1, "1024 KiB"),
        (MIB, "1 MiB"), (1000 * MIB, "1000 MiB"), (1.42 * GIB, "1.42 GiB"), (123.4 * GIB, "123 GiB"),
        (2500 * TIB, "2500 TiB"), (-2 * GIB, "-2 GiB"),
    ],
)  # fmt: skip
def test_sizes_people_read(num_bytes, text):
    assert format_bytes(num_bytes) == text


@given(st.integers(1, 1 << 50))
def test_what_is_printed_can_be_parsed_and_is_near(num_bytes):
    assert parse_bytes(format_bytes(num_bytes), "key") == pytest.approx(num_bytes, rel=0.006)


@given(st.integers(0, 1 << 50), st.integers(1, 1 << 30))
def test_align_up_is_the_next_multiple(value, multiple):
    aligned = align_up(value, multiple)
    assert aligned % multiple == 0 and value <= aligned < value + multiple
