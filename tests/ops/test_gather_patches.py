"""gather_patches: the kernel against patches cut by slicing, then the op against PyTorch's checks."""

import pytest
import torch
from fastmim_kernels import gather_patches
from fastmim_kernels.gather_patches import gather_patches_reference, launch_backward, launch_forward
from fastmim_kernels.testing import assert_no_worse

MEANS, STDS = (0.485, 0.456, 0.406, 0.3), (0.229, 0.224, 0.225, 0.5)
# B, H, W, C, patch, K: ViT-B/16 (768 values), 49 of 196 seen; ViT-H/14 (588); patch 4 (48), not square,
# 6 x 10 patches; gray images; four channels, where a row fills a power of two; every patch of one image
CASES = [
    (2, 224, 224, 3, 16, 49),
    (2, 56, 56, 3, 14, 7),
    (3, 24, 40, 3, 4, 23),
    (2, 32, 32, 1, 8, 5),
    (2, 16, 48, 4, 8, 3),
    (1, 32, 32, 3, 4, 64),
]
BYTES, FP32, BF16, FP16 = torch.uint8, torch.float32, torch.bfloat16, torch.float16


def make_inputs(B, H, W, C, patch, K, dtype, device):
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (B, H, W, C), generator=rng, dtype=BYTES)
    count = (H // patch) * (W // patch)
    index = torch.stack([torch.randperm(count, generator=rng)[:K] for _ in range(B)])
    image = image if dtype == BYTES else image.to(dtype) / 255
    return image.to(device), index.to(device), (patch, MEANS[:C], STDS[:C])


def rows_by_slicing(image, index, patch, mean, std):
    """fp64, one patch at a time, with no index arithmetic but a corner."""
    x = image.double() / 255 if image.dtype == BYTES else image.double()
    x = (x - x.new_tensor(mean)) / x.new_tensor(std)
    out = []
    for b, row in enumerate(index.tolist()):
        for n in row:
            top, left = n // (image.shape[2] // patch) * patch, n % (image.shape[2] // patch) * patch
            out.append(x[b, top : top + patch, left : left + patch].reshape(-1))
    return torch.stack(out).view(*index.shape, -1)


@pytest.mark.parametrize("out", [FP32, BF16, FP16])
@pytest.mark.parametrize("dtype", [BYTES, FP32, BF16])
@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_definition(case, dtype, out, device):
    image, index, norm = make_inputs(*case, dtype, device)
    oracle = rows_by_slicing(image, index, *norm)
    assert torch.equal(oracle, gather_patches_reference(image, index, *norm, torch.float64))
    rows = launch_forward(image, index, *norm, out)
    assert rows.dtype == out
    assert_no_worse("rows", rows, oracle, gather_patches_reference(image, index, *norm, out))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("case", CASES)
def test_gradient_of_a_float_image(case, dtype, device):
    image, index, norm = make_inputs(*case, dtype, device)
    index[:, -1] = index[:, 0]  # a repeated patch: its gradients add up
    drows = torch.randn(*index.shape, norm[0] ** 2 * case[3], generator=torch.Generator().manual_seed(1))
    drows = drows.to(device, dtype)

    def backward(cast):
        x = image.to(cast).requires_grad_()
        rows = gather_patches_reference(x, index, *norm, cast)
        return torch.autograd.grad(rows, x, drows.to(cast))[0]

    oracle, naive = backward(torch.float64), backward(FP32).to(dtype)
    dimage = launch_backward(drows, index, image.shape, dtype, norm[0], norm[2])
    assert dimage.dtype == dtype
    assert_no_worse("dimage", dimage, oracle, naive)
    through_op = torch.autograd.grad(
        gather_patches(image.requires_grad_(), index, *norm, dtype=dtype), image, drows
    )[0]
    assert_no_worse("dimage of the op", through_op, oracle, naive)


def test_strides_do_not_matter(device):
    image, index, norm = make_inputs(4, 24, 40, 3, 4, 9, BYTES, device)
    expected = rows_by_slicing(image, index, *norm).float()
    channels_first = image.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    wide = torch.nn.functional.pad(
        image, (0, 1, 2, 3)
    )  # four channels of which three, a crop of a larger image
    for view in (channels_first, wide[:, :, 2:-3, :3], image.flip(0).flip(0)):
        for gather in (gather_patches, lambda *a: launch_forward(*a, FP32)):
            torch.testing.assert_close(gather(view, index, *norm), expected)
    sparse = torch.stack([index, index], 2)[:, :, 0]  # an index with gaps
    for gather in (gather_patches, lambda *a: launch_forward(*a, FP32)):
        torch.testing.assert_close(gather(image[::2], sparse[::2], *norm), expected[::2])


@pytest.mark.parametrize("empty", ["images", "patches"])
def test_nothing_to_gather(empty, device):
    image, index, norm = make_inputs(2, 8, 8, 3, 4, 2, FP32, device)
    image, index = (image[:0], index[:0]) if empty == "images" else (image, index[:, :0])
    assert launch_forward(image, index, *norm, FP32).shape == (*index.shape, 48)
    dimage = launch_backward(
        torch.zeros(*index.shape, 48, device=device), index, image.shape, FP32, 4, norm[2]
    )
    assert torch.equal(dimage, torch.zeros_like(image))
    assert gather_patches(image, index, *norm).shape == (*index.shape, 48)


@pytest.mark.parametrize("dtype", [BYTES, FP32])
def test_op_is_registered_right(dtype, device):
    image, index, norm = make_inputs(2, 8, 12, 3, 4, 2, dtype, device)
    for view in (image, image.transpose(1, 2)):
        view = view.detach().requires_grad_(dtype == FP32)
        torch.library.opcheck(torch.ops.fastmim.gather_patches.default, (view, index, *norm, FP32))
    drows = torch.randn(2, 2, 48, device=device)
    torch.library.opcheck(
        torch.ops.fastmim.gather_patches_backward.default, (drows, index, image.shape, FP32, 4, norm[2])
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_public_op_matches_reference_and_compiles_to_one_graph(compiled, device):
    image, index, norm = make_inputs(2, 8, 12, 3, 4, 3, FP32, device)
    step = torch.compile(gather_patches, fullgraph=True) if compiled else gather_patches
    results = []
    for gather in (step, gather_patches_reference):  # never the op against itself
        x = image.clone().requires_grad_()
        loss = gather(x, index, *norm).square().mean()
        results.append((loss.detach(), *torch.autograd.grad(loss, x)))
    torch.testing.assert_close(results[0], results[1])


def test_rejects_what_it_cannot_do(device):
    image, index, norm = make_inputs(2, 8, 12, 3, 4, 3, BYTES, device)
    patch, mean, std = norm
    with pytest.raises(ValueError, match="multiples of the patch"):
        gather_patches(image, index, 5, mean, std)
    with pytest.raises(ValueError, match="of 3 channels"):
        gather_patches(image, index, patch, mean[:1], std)
    with pytest.raises(ValueError, match="of 3 channels"):
        gather_patches(image, index, patch, mean, (0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"want \[B, H, W, C\]"):
        gather_patches(image.int(), index, *norm)
    with pytest.raises(ValueError, match="want index int64"):
        gather_patches(image, index[:1], *norm)
    with pytest.raises(ValueError, match="want rows of"):
        gather_patches(image, index, *norm, dtype=torch.float64)


@pytest.mark.parametrize("bad", [-1, 6])
def test_a_wrong_index_is_found_on_the_cpu(bad):
    image, index, norm = make_inputs(2, 8, 12, 3, 4, 3, BYTES, "cpu")
    index[1, 2] = bad
    with pytest.raises(ValueError, match=r"patch indices in \[0, 6\)"):
        gather_patches(image, index, *norm)
