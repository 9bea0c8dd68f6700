"""Planted faults of apply: each must turn a test red (`make mutants`)."""

TESTS = [
    "tests/ops/apply/test_equal.py",
    "tests/ops/apply/test_instance.py",
    "tests/ops/apply/test_left.py",
    "tests/ops/apply/test_trial.py",
    "tests/ops/apply/test_refused.py",
]
PARTS = "kernels/fastmim_kernels/apply/parts.py"
SWAP = "kernels/fastmim_kernels/apply/swap.py"
TIMM = "kernels/fastmim_kernels/apply/timm.py"
HF = "kernels/fastmim_kernels/apply/transformers.py"
MASKING = "kernels/fastmim_kernels/apply/masking.py"
MAE = "kernels/fastmim_kernels/apply/mae.py"
TRIAL = "kernels/fastmim_kernels/apply/trial.py"
ONCE = "kernels/fastmim_kernels/once.py"
PATCH = "kernels/fastmim_kernels/apply/api.py"
FAULTS = [
    (PARTS, "act.act is F.gelu", "True", "another activation of transformers is taken for GELU", "said"),
    (PARTS, "eps=self.eps, ", "", "the norm's own eps is lost", "timm-"),
    (PARTS, "scale=scale, keep=keep)", "keep=keep)", "LayerScale is left out", "LayerScale"),
    (PARTS, "elif hooked(first, act):\n", "elif False:\n", "hooks on fc1 see other values", "said"),
    (SWAP, 'names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}',
     'names = {"__doc__": base.__doc__}', "modules known by name are not found", "another_instance"),
    (TIMM, 'elif getattr(drop, "p", 0):', "elif False:", "attention dropout is lost", "dropout or said"),
    (HF, "attention_mask = bias if attention_mask is None else bias + attention_mask",
     "attention_mask = attention_mask", "no relative positions", "relative"),
    (HF, "config.return_dict if return_dict is None else return_dict)", "True)", "return_dict is ignored",
     "tuple"),
    (MASKING, "start_B1 + 1 + restore_BN", "start_B1 + restore_BN", "all tokens one place off", "ViTMAE"),
    (MASKING, "(loss_BN * mask_BN).sum()", "loss_BN.sum()", "visible patches are scored too", "ViTMAE"),
    (MASKING, "normalize=normalize", "normalize=True", "plain pixels are normalized", "plain"),
    (MAE, "    if not agree:\n", "    if False:\n", "the trial finds nothing", "not_maes"),
    (PATCH, "    if patched:\n", "    if False:\n", "patched twice", "twice"),
    (TRIAL, "        known[key] = trial(root, finding)", "        known[key] = None", "nothing is tried",
     "looks_like"),
    (TRIAL, "buffer.copy_(value)", "pass", "statistics move between the two runs", "no_trace"),
    (TRIAL, "(torch.randn(p.shape, device=p.device) * std).to(p.dtype)", "p.detach().clone()",
     "zeros hide who adds them where", "hide_nothing"),
    (SWAP, "isinstance(x, torch.fx.Proxy)", "isinstance(x, type)", "torch.fx stumbles", "says_revert"),
]  # fmt: skip
