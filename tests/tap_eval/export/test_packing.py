import pytest
import torch

from tap_eval.export.packing import packed, unpacked


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 3, 3), (1, 8), (4, 1)])
def test_rows_come_back_from_as_many_bytes_as_their_bits_take(bits, shape):
    top = 2 ** (bits - 1) - 1
    integers = torch.randint(-top, top + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    count = integers[0].numel()

    rows = packed(integers, bits)

    assert rows.shape == (len(integers), -(-count * bits // 8))
    assert torch.equal(unpacked(rows, bits, count).view(shape), integers)


def test_numbers_follow_each_other_from_the_lowest_bit_on():
    # 3 bits, offset 4: -3, 0, 3 are 001, 100, 111, read from the right: 1 11 | 100 | 001
    assert packed(torch.tensor([[-3, 0, 3]], dtype=torch.int8), 3).tolist() == [[0b11100001, 0b1]]
