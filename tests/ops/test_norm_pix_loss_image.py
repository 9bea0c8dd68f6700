"""norm_pix_loss_image: the kernel against the fp64 definition, then the op against PyTorch's checks."""

import pytest
import torch
from fastmim_kernels import norm_pix_loss_image
from fastmim_kernels.norm_pix_loss import DISTANCES
from fastmim_kernels.norm_pix_loss_image import (
    launch_backward,
    launch_forward,
    norm_pix_loss_image_reference,
)
from fastmim_kernels.testing import assert_no_worse

BYTES, FP32, BF16, FP16 = torch.uint8, torch.float32, torch.bfloat16, torch.float16
MEANS, STDS = (0.485, 0.456, 0.406, 0.3), (0.229, 0.224, 0.225, 0.5)
# B, H, W, C, patch, L: 147 of ViT-B/16's 196 patches are scored; ViT-H/14; patch 4, not square, 6 x 10
# patches, two programs of rows; gray; four channels; every patch of one image
CASES = [
    (1, 224, 224, 3, 16, 147),
    (2, 56, 56, 3, 14, 9),
    (3, 24, 40, 3, 4, 23),
    (2, 32, 32, 1, 8, 5),
    (2, 16, 48, 4, 8, 3),
    (1, 32, 32, 3, 4, 64),
]


def make_inputs(B, H, W, C, patch, L, image_dtype, dtype, device):
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (B, H, W, C), generator=rng, dtype=BYTES)
    image[0, : H // 2] = 77  # flat patches: what varies is the normalization of the channels, if anything
    count, P = (H // patch) * (W // patch), patch * patch * C
    index = torch.stack([torch.randperm(count, generator=rng)[:L] for _ in range(B)])
    pred, dloss = torch.randn(B, L, P, generator=rng), torch.randn(B, L, generator=rng)
    image = image if image_dtype == BYTES else image.to(image_dtype) / 255
    norm = patch, MEANS[:C], STDS[:C]
    return pred.to(device, dtype), image.to(device), index.to(device), norm, dloss.to(device)


def forward_backward(cast, pred, image, index, norm, dloss, normalize):
    p = pred.to(cast).requires_grad_()
    loss = norm_pix_loss_image_reference(p, image, index, *norm, normalize)
    return loss.detach(), torch.autograd.grad(loss, p, dloss.to(cast))[0]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("image_dtype", "dtype"), [(BYTES, FP32), (BYTES, BF16), (BYTES, FP16), (BF16, FP32)]
)
@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_definition(case, image_dtype, dtype, normalize, device):
    inputs = pred, image, index, norm, dloss = make_inputs(*case, image_dtype, dtype, device)
    oracle = forward_backward(torch.float64, *inputs, normalize)
    naive = forward_backward(FP32, *inputs, normalize)
    options = image, index, *norm, normalize, 1e-6
    assert_no_worse("loss", launch_forward(pred, *options), oracle[0], naive[0])
    dpred = launch_backward(dloss, pred, *options)
    assert dpred.dtype == dtype
    assert_no_worse("dpred", dpred, oracle[1], naive[1].to(dtype))


@pytest.mark.parametrize("distance", [1, 2])
@pytest.mark.parametrize("normalize", [True, False])  # SimMIM's is plain
def test_other_distances_match_their_definition(normalize, distance, device):
    pred, image, index, norm, dloss = make_inputs(2, 56, 56, 3, 14, 9, BYTES, FP32, device)

    def of(cast):
        p = pred.to(cast).requires_grad_()
        loss = norm_pix_loss_image_reference(
            p, image, index, *norm, normalize, 1e-6, DISTANCES[distance], 0.5
        )
        return loss.detach(), torch.autograd.grad(loss, p, dloss.to(cast))[0]

    oracle, naive = of(torch.float64), of(FP32)
    options = image, index, *norm, normalize, 1e-6, distance, 0.5
    assert_no_worse("loss", launch_forward(pred, *options), oracle[0], naive[0])
    assert_no_worse("dpred", launch_backward(dloss, pred, *options), oracle[1], naive[1])
    form = {"normalize": normalize, "distance": DISTANCES[distance], "beta": 0.5}
    p = pred.clone().requires_grad_()
    loss = norm_pix_loss_image(p, image, index, *norm, **form)
    assert_no_worse("public loss", loss.detach(), oracle[0], naive[0])
    assert_no_worse("public dpred", torch.autograd.grad(loss, p, dloss)[0], oracle[1], naive[1])


def test_a_prediction_of_the_normalized_patch_costs_nothing(device):
    """Against the formula itself: a patch cut out by slicing, normalized by hand."""
    _, image, index, norm, _ = make_inputs(2, 24, 40, 3, 4, 6, BYTES, FP32, device)
    x = (image.double() / 255 - image.new_tensor(norm[1], dtype=torch.float64)) / image.new_tensor(
        norm[2], dtype=torch.float64
    )
    patches = torch.stack(
        [
            torch.stack([x[b, n // 10 * 4 :][:4, n % 10 * 4 :][:, :4].flatten() for n in row])
            for b, row in enumerate(index.tolist())
        ]
    )
    exact = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    for pred, normalize in ((exact, True), (patches, False)):
        loss = launch_forward(pred.float(), image, index, *norm, normalize, 1e-6)
        assert loss.max() < 1e-10
        assert norm_pix_loss_image(pred.float(), image, index, *norm, normalize=normalize).max() < 1e-10


def test_strides_do_not_matter(device):
    pred, image, index, norm, dloss = make_inputs(4, 24, 40, 3, 4, 9, BYTES, FP32, device)
    wide = torch.nn.functional.pad(pred, (5, 6, 1, 1))[
        :, 1:-1, 5:-6
    ]  # class token cut off, gaps in every row
    channels_first = image.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    sparse = torch.stack([index, index], 2)[:, :, 0]
    expected = norm_pix_loss_image_reference(pred, image, index, *norm)
    for loss in (norm_pix_loss_image, lambda *a: launch_forward(*a, True, 1e-6)):
        torch.testing.assert_close(loss(wide, channels_first, sparse, *norm), expected)
    torch.testing.assert_close(
        launch_backward(dloss.T.contiguous().T, wide, channels_first, sparse, *norm, True, 1e-6),
        forward_backward(FP32, pred, image, index, norm, dloss, True)[1],
    )


@pytest.mark.filterwarnings("ignore:var_mean")  # of no values
def test_nothing_to_score(device):
    pred, image, index, norm, dloss = make_inputs(2, 8, 8, 3, 4, 2, BYTES, FP32, device)
    for none in ((slice(0), slice(None)), (slice(None), slice(0))):
        few = image[none[0]], index[none]
        assert launch_forward(pred[none], *few, *norm, True, 1e-6).shape == index[none].shape
        assert launch_backward(dloss[none], pred[none], *few, *norm, True, 1e-6).shape == pred[none].shape
        assert norm_pix_loss_image(pred[none], *few, *norm).shape == index[none].shape


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_op_is_registered_right(dtype, device):
    pred, image, index, norm, dloss = make_inputs(2, 8, 12, 3, 4, 2, BYTES, dtype, device)
    options = image, index, *norm, True, 1e-6
    torch.library.opcheck(torch.ops.fastmim.norm_pix_loss_image_backward.default, (dloss, pred, *options))
    torch.library.opcheck(torch.ops.fastmim.norm_pix_loss_image.default, (pred.requires_grad_(), *options))


@pytest.mark.parametrize("compiled", [False, True])
def test_public_op_matches_reference_and_compiles_to_one_graph(compiled, device):
    pred, image, index, norm, _ = make_inputs(2, 8, 12, 3, 4, 3, BYTES, FP32, device)
    step = torch.compile(norm_pix_loss_image, fullgraph=True) if compiled else norm_pix_loss_image
    results = []
    for loss_of in (step, norm_pix_loss_image_reference):  # never the op against itself
        p = pred.clone().requires_grad_()
        loss = loss_of(p, image, index, *norm).mean()
        results.append((loss.detach(), *torch.autograd.grad(loss, p)))
    torch.testing.assert_close(results[0], results[1])


def test_rejects_what_it_cannot_do(device):
    pred, image, index, norm, _ = make_inputs(2, 8, 12, 3, 4, 3, BYTES, FP32, device)
    with pytest.raises(ValueError, match="want pred"):
        norm_pix_loss_image(pred[:, :2], image, index, *norm)
    with pytest.raises(ValueError, match="want pred fp32"):
        norm_pix_loss_image(pred.double(), image, index, *norm)
    with pytest.raises(ValueError, match="contiguous"):
        norm_pix_loss_image(pred.transpose(1, 2).contiguous().transpose(1, 2), image, index, *norm)
    with pytest.raises(ValueError, match="multiples of the patch"):
        norm_pix_loss_image(pred, image[:, :-1], index, *norm)
    with pytest.raises(ValueError, match="want a distance of"):
        norm_pix_loss_image(pred, image, index, *norm, distance="huber")
    with pytest.raises(ValueError, match="image gets no gradient"):
        norm_pix_loss_image(pred, (image / 255).requires_grad_(), index, *norm)
    with pytest.raises(ValueError, match="want 2 <= P"):
        norm_pix_loss_image(pred[..., :1], image[..., :1], index, 1, (0.5,), (0.5,))


def test_a_wrong_index_is_found_on_the_cpu():
    pred, image, index, norm, _ = make_inputs(2, 8, 12, 3, 4, 3, BYTES, FP32, "cpu")
    index[0, 0] = 6
    with pytest.raises(ValueError, match="patch indices"):
        norm_pix_loss_image(pred, image, index, *norm)
