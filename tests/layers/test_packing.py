"""Packing lays sequences end to end and undoes it."""

import torch

from dinov2.layers import pack, unpack


def test_unpack_undoes_pack() -> None:
    groups = [torch.randn(2, 5, 3), torch.randn(4, 1, 3), torch.randn(0, 7, 3)]
    tokens, segments = pack(groups)
    assert tokens.shape == (14, 3)
    assert segments == ((2, 5), (4, 1), (0, 7))
    for group, back in zip(groups, unpack(tokens, segments), strict=True):
        assert torch.equal(group, back)


def test_sequences_lie_end_to_end_in_order() -> None:
    tokens, _ = pack([torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.tensor([[[5.0], [6.0], [7.0]]])])
    assert tokens.flatten().tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_a_single_group_is_not_copied() -> None:
    group = torch.randn(2, 5, 3)
    tokens, segments = pack([group])
    assert tokens.data_ptr() == group.data_ptr() == unpack(tokens, segments)[0].data_ptr()
