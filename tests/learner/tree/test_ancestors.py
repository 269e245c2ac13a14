"""Attention to ancestors: segments and FlexAttention's blocks against the M x M mask itself."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from learner.tree.ancestors import groups, rows_of, segments, visible_blocks
from learner.tree.attention import BLOCK, FlexTreeAttention, SegmentAttention, block_mask
from learner.tree.pack import Pack, pack, padded
from tests.learner.tree.test_layout import SHAPES, path_of, pieces_of, tree_of


def pack_of(*shapes: tuple[int, int, int]) -> Pack:
    return pack(pieces_of([tree_of(shape, i) for i, shape in enumerate(shapes)]))


def mask_of(packed: Pack) -> torch.Tensor:
    """[M, M], path by path; padding sees itself."""
    mask = torch.zeros(len(packed.ids), len(packed.ids), dtype=torch.bool)
    for q in range(len(packed.ids)):
        mask[q, path_of(packed, q)] = True
    return mask


def dense_attention(packed: Pack, query, key, value, scale: float) -> torch.Tensor:
    """[1, M, H, D]; the definition, with every score."""
    queries_per_key = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(queries_per_key, 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~mask_of(packed), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def random_states(tokens: int, heads: int = 4, key_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(1, h, tokens, 16, generator=generator, dtype=torch.float64).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]


PACKS = [*[(shape,) for shape in SHAPES], (SHAPES[2], SHAPES[4], SHAPES[0], SHAPES[3])]


@pytest.mark.parametrize("shapes", PACKS, ids=str)
def test_segments_attend_to_their_ancestors_and_so_do_their_gradients(shapes):
    packed = pack_of(*shapes)
    states = random_states(len(packed.ids))
    attended = SegmentAttention(packed.predecessor, packed.position).attend(*states, 0.3)
    want = dense_attention(packed, *states, 0.3)
    assert torch.allclose(attended, want, rtol=1e-12, atol=1e-12)
    toward = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((attended * toward).sum(), states),
        torch.autograd.grad((want * toward).sum(), states),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("longest", [1, 5, 1000])
def test_segments_are_runs_of_the_tree_and_their_keys_its_paths(longest, monkeypatch):
    monkeypatch.setattr(segments, "__defaults__", (longest,))
    packed = pack_of(*SHAPES[2:5])
    runs = [range(*run) for run in segments(packed.predecessor.numpy()).tolist()]
    assert [t for run in runs for t in run] == list(range(len(packed.ids)))
    assert max(map(len, runs)) <= longest
    segment_groups, seen = groups(packed.predecessor, packed.position), set()
    for group in segment_groups:
        for b, query in enumerate(group.query_BQ.tolist()):
            for i, q in enumerate(query):
                keys = group.key_BK[b][group.visible_BQK[b, i]].tolist()
                assert keys == path_of(packed, q)
                seen.add(q)
    assert seen == set(range(len(packed.ids)))
    flat = torch.cat([group.query_BQ.flatten() for group in segment_groups])
    assert flat[rows_of(flat, len(packed.ids))].tolist() == list(range(len(packed.ids)))


def test_segments_of_like_size_share_a_call_without_much_padding():
    tree = tree_of((12, 20, 6))
    packed = pack(pieces_of([tree] * 8))
    runs = [range(*run) for run in segments(packed.predecessor.numpy()).tolist()]
    segment_groups = groups(packed.predecessor, packed.position)
    needed = sum(len(run) * (int(packed.position[run[-1]]) + 1) for run in runs)
    assert len(segment_groups) <= len(runs) / 8
    assert sum(group.visible_BQK.numel() for group in segment_groups) < 1.1 * needed


@pytest.mark.parametrize("block", [2, 8, 64])
@pytest.mark.parametrize("shapes", PACKS, ids=str)
def test_blocks_are_visible_and_full_where_the_mask_says_so(shapes, block):
    packed = pack_of(*shapes)
    packed = padded(packed, -(-len(packed.ids) // block) * block)
    tiles = mask_of(packed).unflatten(0, (-1, block)).unflatten(2, (-1, block))
    some, every = visible_blocks(packed.last, block)
    assert torch.equal(some, tiles.any(3).any(1))
    below = torch.ones_like(every).tril(-1)
    assert torch.equal(every, tiles.all(3).all(1) & below)


@pytest.mark.parametrize("heads", [(4, 2), (6, 2)], ids=str)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_what_segments_give(heads):
    packed = pack_of(SHAPES[3], SHAPES[4], SHAPES[2])
    long = padded(packed, -(-len(packed.ids) // BLOCK) * BLOCK)
    states = [x.detach() for x in random_states(len(long.ids), *heads)]
    attended = FlexTreeAttention(long.last, flex_attention).attend(*states, 0.3)
    real = [x[:, :, : len(packed.ids)] for x in states]
    want = SegmentAttention(packed.predecessor, packed.position).attend(*real, 0.3)
    assert torch.allclose(attended[:, : len(packed.ids)], want, rtol=1e-6, atol=1e-6)


def test_the_block_mask_lists_the_blocks_with_a_visible_pair():
    packed = pack_of(*SHAPES * 4)
    packed = padded(packed, -(-len(packed.ids) // BLOCK) * BLOCK)
    mask, some = block_mask(packed.last), visible_blocks(packed.last, BLOCK)[0]
    assert len(some) > 8 and not bool(some.all())
    assert torch.equal(mask.to_dense()[0, 0].bool(), some)
    assert mask.shape[-2:] == (len(packed.ids), len(packed.ids))


def test_packs_of_one_length_share_a_compilation():
    """Traced by the compiler, run without it."""
    torch._dynamo.reset()
    kernel = torch.compile(flex_attention, dynamic=False, backend="eager")

    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    before, compiled = graphs(), []
    rng = random.Random(0)
    for blocks in (1, 2, 1, 2, 2, 1):
        packed = pack(pieces_of([tree_of((2, 8, 1), rng.randrange(100))]))
        packed = padded(packed, blocks * BLOCK)
        states = [x.detach() for x in random_states(blocks * BLOCK)]
        FlexTreeAttention(packed.last, kernel).attend(*states, 0.3)
        compiled.append(graphs() - before)
    assert compiled[0] < compiled[1] and compiled[2:] == [compiled[1]] * 4
