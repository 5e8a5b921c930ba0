"""Tokens that are patches: what makes a code, what keeps it, and what the agent sees of it."""

from __future__ import annotations

import pytest
import torch
from einops import repeat

from rem_atari.config import TokenizerConfig
from rem_atari.models.patches import PatchTokenizer

CFG = TokenizerConfig(kind="patches", channels=(1, 1, 1), codebook_size=16, code_dim=5)
"""Patches of 4 x 4 pixels; frames of 8 x 8 have four of them."""


def patch_tokenizer(**changes) -> PatchTokenizer:
    torch.manual_seed(0)
    return PatchTokenizer(TokenizerConfig(**{**vars(CFG), **changes}), 8)


def cells(*levels: int) -> torch.Tensor:
    """A frame of four patches of one grey level each, (1, 8, 8, 3) uint8."""
    square = torch.tensor(levels, dtype=torch.uint8).reshape(2, 2)
    return repeat(square, "h w -> 1 (h p) (w q) c", p=4, q=4, c=3)


def random_cells(count: int, levels: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(levels, (count, 4), generator=generator)
    return torch.cat([cells(*row) for row in drawn.tolist()])


def test_each_kind_of_patch_becomes_a_code_and_frames_come_back_exactly():
    tokenizer = patch_tokenizer()
    frames = random_cells(20, levels=9, seed=0)
    assert tokenizer.grow(frames) == 9
    assert tokenizer.grow(frames) == 0
    assert torch.equal(tokenizer.decode(tokenizer.encode(frames)), frames)
    assert tokenizer.coverage(frames) == 1.0


def test_patches_that_differ_in_one_level_of_one_channel_are_two_codes():
    """Also at 32 x 32 pixels, where float32 could not tell them apart."""
    torch.manual_seed(0)
    tokenizer = PatchTokenizer(TokenizerConfig(channels=(1,) * 6, codebook_size=4, code_dim=2), 32)
    frames = torch.full((2, 32, 32, 3), 255, dtype=torch.uint8)
    frames[1, 17, 5, 2] = 254
    assert tokenizer.grow(frames) == 2
    assert torch.equal(tokenizer.decode(tokenizer.encode(frames)), frames)


def test_growth_changes_no_token_and_no_code_that_was_there():
    tokenizer = patch_tokenizer(patch_threshold=0.004, codebook_size=64)  # 8 levels of 255
    first, second = (random_cells(20, levels=256, seed=seed) for seed in (0, 1))
    tokenizer.grow(first)
    size, tokens, codes = int(tokenizer.num_codes), tokenizer.encode(first), tokenizer.codes.clone()
    assert tokenizer.grow(second) > 0
    # Nearest codes would not do: some of the new ones are nearer.
    errors = tokenizer._errors(tokenizer._split(first).flatten(0, 1), tokenizer.patches)
    assert not torch.equal(errors[:, : int(tokenizer.num_codes)].argmin(dim=-1), tokens.flatten())
    assert torch.equal(tokenizer.encode(first), tokens)
    assert torch.equal(tokenizer.codes[:size], codes[:size])


def test_within_the_threshold_a_patch_needs_no_code_of_its_own():
    threshold = (10 / 127.5) ** 2
    tokenizer = patch_tokenizer(patch_threshold=threshold)
    assert tokenizer.grow(cells(100, 100, 109, 91)) == 1
    assert tokenizer.grow(cells(111, 111, 111, 111)) == 1
    assert tokenizer.encode(cells(100, 109, 91, 111)).tolist() == [[0, 0, 0, 1]]


def test_a_full_codebook_holds_the_commonest_patches_and_the_rest_are_drawn_as_the_nearest():
    tokenizer = patch_tokenizer(codebook_size=2)
    assert tokenizer.grow(torch.cat((cells(0, 0, 0, 200), cells(0, 0, 0, 200), cells(0, 0, 90, 80)))) == 2
    assert tokenizer.grow(cells(50, 60, 70, 80)) == 0
    assert tokenizer.encode(cells(0, 200, 90, 150)).tolist() == [[0, 1, 0, 1]]
    assert tokenizer.coverage(cells(0, 200, 90, 150)) == 0.5


def test_no_token_is_a_code_still_to_come():
    """Those are black: they must not be what black patches look like."""
    tokenizer = patch_tokenizer()
    tokenizer.grow(cells(9, 9, 9, 9))
    assert tokenizer.encode(cells(0, 0, 0, 0)).tolist() == [[0, 0, 0, 0]]


def test_what_is_seen_of_codes_is_as_far_apart_as_their_pixels():
    tokenizer = patch_tokenizer(code_dim=64)
    frames = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tokenizer.grow(frames)
    pixels = tokenizer.patches.double() / 255
    ours, theirs = (
        torch.cdist(tokenizer.codes.double(), tokenizer.codes.double()),
        torch.cdist(pixels, pixels),
    )
    scale = (48 / 64) ** 0.5  # 48 numbers of a patch seen as 64
    torch.testing.assert_close(ours, theirs * scale, rtol=1e-5, atol=1e-5)


def test_codes_survive_a_checkpoint():
    tokenizer, other = patch_tokenizer(), patch_tokenizer()
    frames = random_cells(20, levels=9, seed=0)
    tokenizer.grow(frames)
    torch.nn.init.zeros_(other.projection)
    other.load_state_dict(tokenizer.state_dict())
    assert torch.equal(other.encode(frames), tokenizer.encode(frames))
    assert other.grow(random_cells(20, levels=12, seed=1)) == tokenizer.grow(
        random_cells(20, levels=12, seed=1)
    )
    assert torch.equal(other.codes, tokenizer.codes)


def test_only_codes_that_there_are_are_seen():
    tokenizer = patch_tokenizer()
    assert torch.equal(tokenizer.codes, torch.zeros(1, 5))
    tokenizer.grow(cells(10, 20, 30, 30))
    assert tokenizer.codes.shape == (3, 5)
    assert tokenizer.codes.any(dim=-1).all()


def test_no_frames_are_no_tokens_and_no_codes():
    tokenizer = patch_tokenizer()
    nothing = torch.zeros(0, 8, 8, 3, dtype=torch.uint8)
    assert tokenizer.grow(nothing) == 0
    assert tokenizer.encode(nothing).shape == (0, 4)
    with pytest.raises(ValueError, match=r"PatchTokenizer\.grow\(\): frames is torch\.uint8 \(8, 8, 3\)"):
        tokenizer.grow(cells(0, 0, 0, 0)[0])


def test_first_codes_may_be_means_so_that_what_is_alike_shares_one():
    tokenizer = patch_tokenizer(patch_means=True, codebook_size=3)
    frames = torch.cat((cells(0, 100, 102, 200), cells(0, 98, 100, 204)))
    tokenizer.fit(frames, torch.Generator().manual_seed(0))
    tokens = tokenizer.encode(frames)
    assert tokens[0, 1] == tokens[0, 2] == tokens[1, 1] == tokens[1, 2]
    assert sorted(tokenizer.patches[:, 0].tolist()) == [0, 100, 202]
    assert tokenizer.grow(cells(50, 60, 70, 80)) == 0
    with pytest.raises(RuntimeError, match="3 codes already; wanted none"):
        tokenizer.fit(frames, torch.Generator())


def test_with_room_for_all_patches_means_are_the_patches():
    tokenizer = patch_tokenizer(patch_means=True)
    frames = random_cells(20, levels=9, seed=0)
    tokenizer.fit(frames, torch.Generator().manual_seed(0))
    assert int(tokenizer.num_codes) == 9
    assert torch.equal(tokenizer.decode(tokenizer.encode(frames)), frames)
    assert tokenizer.grow(random_cells(20, levels=12, seed=1)) > 0
