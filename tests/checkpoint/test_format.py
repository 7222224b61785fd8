"""Names on disk and chunks: what holds for all of them, whatever a file says."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.checkpoint.format import ArraySpec, chunk_shape, cut_chunks, encode_name, list_arrays
from horizon.config.schema import Moments
from horizon.layout import ParamSpec, place_block

NAMES = st.text(max_size=300)
SHAPES = st.lists(st.integers(0, 12), max_size=4).map(tuple)


@given(NAMES, NAMES)
def test_names_on_disk_are_harmless_and_no_two_are_the_same(one, other):
    encoded = encode_name(one)
    assert 0 < len(encoded.encode()) <= 200
    assert not set(encoded) & set('/\\\0:*?"<>| \n') and not encoded.startswith(".")
    assert (encoded == encode_name(other)) is (one == other)


def test_names_of_models_stay_as_they_are_and_others_cannot_leave_the_folder():
    name = "model.layers.0.self_attn.q_proj.weight"
    assert encode_name(name) == name
    assert encode_name("../../etc/passwd") == "%2E.%2F..%2Fetc%2Fpasswd"
    assert encode_name("..") == "%2E."
    assert encode_name("gewöhnlich") == "gew%C3%B6hnlich"
    assert encode_name("%41") != encode_name("A")
    assert len(encode_name("x" * 300)) == 200 and encode_name("x" * 300).startswith("x" * 166 + "%~")
    long = ["x" * 300 + end for end in "ab"]
    assert len({encode_name(name) for name in long}) == 2


@settings(deadline=None)
@given(SHAPES, st.sampled_from([1, 2, 4, 8]), st.integers(8, 1024))
def test_chunks_are_runs_of_the_flat_array_that_cover_it_once(shape, itemsize, chunk_bytes):
    chunk = chunk_shape(shape, itemsize, chunk_bytes)
    assert math.prod(chunk) * itemsize <= chunk_bytes
    chunks = [*cut_chunks(shape, chunk)]
    assert [c.start for c in chunks] == [0, *(c.stop for c in chunks)][: len(chunks)]
    assert (chunks[-1].stop if chunks else 0) == math.prod(shape)
    assert len({c.file for c in chunks}) == len(chunks)
    for c in chunks:
        places = [
            sum(i * math.prod(shape[axis + 1 :]) for axis, i in enumerate(index))
            for index in itertools.product(*(range(part.start, part.stop) for part in c.index))
        ]
        assert places == [*range(c.start, c.stop)]
    if chunks and math.prod(shape) * itemsize > 2 * chunk_bytes:  # little is written only to fill chunks up
        assert len(chunks) <= 4 * math.prod(shape) * itemsize / chunk_bytes + math.prod(shape[:-1])


@given(st.integers(1, 2000), st.integers(1, 600))
def test_chunks_of_a_matrix_begin_with_a_group_where_there_is_room_for_64_rows(rows, columns):
    chunk = chunk_shape((rows, columns), 4, 64 * columns * 4)
    assert all(c.start % 64 == 0 for c in cut_chunks((rows, columns), chunk))


def test_a_large_embedding_is_cut_into_nearly_equal_chunks():
    spec = ArraySpec("embed", "master", (151936, 2048), "float32")
    chunks = [*spec.chunks]
    assert len(chunks) == 19 and chunks[-1].file == "c.18.0"
    assert len(chunks) * spec.chunk_file_bytes < 1.01 * spec.num_bytes
    assert spec.chunk_file_bytes <= (64 << 20) + 4


def test_every_parameter_has_its_states_and_frozen_ones_only_a_master():
    specs = [ParamSpec("a", "a", (10, 10)), ParamSpec("b", "b", (3,), False), ParamSpec("c", "c", (130,))]
    layout = place_block(0, "block", specs)
    found = {
        moments: {
            (a.spec.name, a.spec.kind): (a.spec.shape, a.spec.dtype, a.start) for a in list_arrays([layout], moments)
        }
        for moments in (None, *Moments)
    }
    masters = {(p.name, "master"): (p.spec.shape, "float32", p.offset) for p in layout.params}
    assert found[None] == masters
    assert found[Moments.bfloat16] == masters | {
        (name, kind): (shape, "bfloat16", start)
        for kind in ("exp_avg", "exp_avg_sq")
        for name, shape, start in (("a", (10, 10), 0), ("c", (130,), 128))
    }
    assert found[Moments.int8]["a", "exp_avg"] == ((10, 10), "uint8", 0)
    assert found[Moments.int8]["a", "exp_avg_scale"] == ((2,), "float32", 0)
    assert found[Moments.int8]["c", "exp_avg_sq_scale"] == ((3,), "float32", 2)
    assert ("b", "exp_avg") not in found[Moments.int8]
