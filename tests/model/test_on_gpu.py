"""What only a GPU can tell: its kernels at real sizes, autocast, micro-batches, DDP, torch.compile, a whole run."""

import json

import pytest
import timm
import torch
import torch.distributed as dist
from conftest import IMAGE_SIZE, captioner_of, tiny_config, tiny_inputs
from test_micro_batches_gap_closed_clip import assert_same_step, inputs_with_groups, noisy_model, step

import gap_closed_clip.model.micro_batches_gap_closed_clip as micro_batches_module
import gap_closed_clip.model.tiled_gap_closed_clip as tiled_module
from gap_closed_clip import GapClosedClipModel, MicroBatches, gap_closed_loss
from gap_closed_clip.evaluation.fast_tower import FastTower
from gap_closed_clip.training import load_config, train
from gap_closed_clip.training.config import CONFIGS


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

DTYPES = {"float32": (torch.float32, 1e-4), "bfloat16": (torch.bfloat16, 1e-2), "float16": (torch.float16, 2e-3)}


def to_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.cuda() for name, x in batch.items()}


def related_vectors(n: int, dim: int, modalities: int, seed: int = 0) -> list[torch.Tensor]:
    """Random unit vectors (n, dim) of each modality, similar within a sample."""
    generator = torch.Generator("cuda").manual_seed(seed)
    common, *noise = torch.randn(1 + modalities, n, dim, device="cuda", generator=generator)
    return [torch.nn.functional.normalize(common + each, dim=1) for each in noise]


def loss_and_gradients(embeddings, scale, groups, **kwargs) -> list[torch.Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in (*embeddings, scale)]
    values = gap_closed_loss(inputs[:-1], inputs[-1], groups, **kwargs)
    return [values.loss, *torch.autograd.grad(values.loss, inputs)]


@pytest.mark.parametrize("several_tiles", [False, True])
@pytest.mark.parametrize(("n", "dim", "modalities", "grouped"), [(3001, 512, 2, True), (2048, 200, 3, False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tiled_objective_is_that_of_the_dense_form_in_float64(
    dtype, n, dim, modalities, grouped, several_tiles, monkeypatch
):
    if several_tiles:
        monkeypatch.setattr(tiled_module, "GPU_TILE_BYTES", 700 * n * 2)
    kind, tolerance = DTYPES[dtype]
    embeddings = [z.to(kind) for z in related_vectors(n, dim, modalities)]
    scale = torch.tensor(1 / 0.07, device="cuda")
    groups = torch.arange(n, device="cuda") // 3 if grouped else None
    found = loss_and_gradients(embeddings, scale, groups, tiled=True)
    expected = loss_and_gradients([z.double() for z in embeddings], scale.double(), groups, tiled=False)
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).norm() <= tolerance * y.norm()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tiled_further_terms_are_those_of_the_dense_form_in_float64(dtype, grouped, monkeypatch):
    n, (kind, tolerance) = 3001, DTYPES[dtype]
    monkeypatch.setattr(tiled_module, "GPU_TILE_BYTES", 700 * n * 2)
    embeddings = [z.to(kind) for z in related_vectors(n, 512, 2)]
    scale, groups = torch.tensor(10.0, device="cuda"), torch.arange(n, device="cuda") // 3 if grouped else None
    terms = {"modality_uniformity_weight": 1.0, "cross_uniformity_weight": 1.0, "logit_bias": -10.0}
    found = loss_and_gradients(embeddings, scale, groups, tiled=True, **terms)
    expected = loss_and_gradients([z.double() for z in embeddings], scale.double(), groups, tiled=False, **terms)
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).norm() <= tolerance * y.norm()


def test_every_run_of_the_kernels_gives_the_same_result():
    embeddings, scale = related_vectors(5000, 512, 2), torch.tensor(14.0, device="cuda")
    embeddings = [z.bfloat16() for z in embeddings]
    first, second = (loss_and_gradients(embeddings, scale, None, tiled=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_step_is_that_of_the_cpu():
    model = noisy_model(dropout=0.0).double()
    inputs = inputs_with_groups()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected = step(model, **inputs)
    output, gradients = step(model.cuda(), **to_gpu(inputs))
    for name in ("loss", "image_embeds", "text_embeds"):
        torch.testing.assert_close(output[name].cpu(), expected[0][name], rtol=1e-9, atol=1e-9)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[name].cpu(), gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n", [64, 1280])  # dense and tiled
def test_bfloat16_autocast_is_close_to_float32(n):
    torch.manual_seed(0)
    model = GapClosedClipModel(tiny_config(center_projections=True)).cuda().train()
    inputs = to_gpu(tiny_inputs(n))
    expected = step(model, **inputs)[0].loss
    with torch.autocast("cuda", torch.bfloat16):
        output, gradients = step(model, **inputs)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=2e-2, atol=2e-2)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_micro_batches_with_dropout_meet_the_same_random_numbers_twice(autocast, monkeypatch):
    """Against the same micro-batches with all activations kept: the GPU's random state has to be put back as well."""
    model = noisy_model(center_projections=True).cuda()
    inputs = inputs_with_groups()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = step(model, micro_batches=MicroBatches.split(inputs, 3))
        monkeypatch.setattr(micro_batches_module, "checkpoint", lambda run, *args, use_reentrant: run(*args))
        expected = step(noisy_model(center_projections=True).cuda(), micro_batches=MicroBatches.split(inputs, 3))
    assert_same_step(found, expected, tolerance=1e-2 if autocast else 1e-4)


def test_ddp_of_one_process_gives_the_same_gradients(tmp_path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = noisy_model(dropout=0.0).cuda()
        inputs = to_gpu(inputs_with_groups())
        expected = step(model, **inputs)[1]
        wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0])
        found = step(wrapped, **inputs)[1]
    finally:
        dist.destroy_process_group()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"module.{name}"], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [16, 1280])  # dense and tiled
def test_a_compiled_model_has_the_same_loss_and_gradients(n):
    model = noisy_model(dropout=0.0).cuda()
    inputs = to_gpu(tiny_inputs(n))
    expected = step(model, **inputs)
    found = step(torch.compile(model), **inputs)
    torch.testing.assert_close(found[0].loss, expected[0].loss, rtol=1e-4, atol=1e-4)
    total = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        assert (found[1][f"_orig_mod.{name}"] - gradient).norm() <= 1e-3 * total


def test_a_convolutional_tower_in_its_fastest_way():
    torch.manual_seed(0)
    tower = timm.create_model("resnet18", num_classes=0).cuda().eval()
    inputs = {"pixel_values": torch.randn(32, 3, 96, 96, device="cuda")}
    with torch.no_grad():
        plain = tower(inputs["pixel_values"])
        fast = FastTower(tower, lambda tower, inputs: tower(inputs["pixel_values"]), inputs)
        found = fast(inputs).float()
        fast.restore()
        torch.testing.assert_close(tower(inputs["pixel_values"]), plain, rtol=1e-3, atol=1e-3)
    assert torch.nn.functional.cosine_similarity(found, plain).min() > 0.98


def test_captions_with_a_cache_and_without(tiny_processor):
    captioner = captioner_of(tiny_processor.tokenizer).cuda()
    pixels = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, device="cuda")
    written = [captioner.generate(pixels, max_new_tokens=12, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*written)


@pytest.mark.parametrize("words", [[], ["bf16=true"], ["contrastive_batch_size=32", "bf16=true"]], ids=str)
def test_a_whole_run(words, tmp_path):
    folder = tmp_path / "run"
    fields = [f"training.output_dir={folder}", "phantom_train_pairs=48", "phantom_validation_pairs=16", "max_steps=3"]
    fields += ["per_device_train_batch_size=16", "report_to=none", "eval_strategy=no", "final_split=validation"]
    result = train(load_config([CONFIGS / "demo.yaml"], [*fields, *words]))
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["device"] == torch.cuda.get_device_name()
    assert result.metrics["true_pair_cosine"] == result.metrics["true_pair_cosine"]
