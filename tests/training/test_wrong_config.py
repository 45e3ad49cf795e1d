"""What is said of a wrong configuration: names and values, on the command line and in files."""

import pytest
from config_files import BASE, write  # noqa: F401
from transformers import TrainingArguments

from gap_closed_clip.training import load_config
from gap_closed_clip.training.config import load_saved_config


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("label_columns=3", r"data\.label_columns is 3 \(int\); it has to be list\[str\] \| None"),
        ("lora.towers=txt", r"lora\.towers: unknown tower 'txt': did you mean 'text'\?"),
        ("lerning_rate=1", r"unknown key 'lerning_rate': did you mean training\.learning_rate\?"),
        ("training.lerning_rate=1", r"unknown key 'lerning_rate' in section 'training': did you mean 'learning_rate'"),
        ("model.aling_weight=1", r"unknown key 'aling_weight' in section 'model': did you mean 'align_weight'\?"),
        ("model.learning_rate=1", r"'learning_rate' in section 'model': it belongs to the section 'training'"),
        ("lr=1e-3", r"unknown key 'lr': did you mean training\.learning_rate\?"),
        ("batch_size=8", r"unknown key 'batch_size': did you mean training\.per_device_train_batch_size\?"),
        ("model.temperature=0.07", r"'temperature' in section 'model': did you mean model\.logit_scale_init_value \("),
        ("modle.vision=x", r"unknown section 'modle' in 'modle.vision': did you mean 'model'\?"),
        ("zzzz=1", r"unknown key 'zzzz'; sections are model, data, training"),
        ("learning_rate", r"'learning_rate' is neither a \.yaml file nor `key=value`"),
        ("learning_rate=fast", r"training\.learning_rate is 'fast' \(str\); it has to be float"),
        ("learning_rate=true", r"training\.learning_rate is True \(bool\); it has to be float"),
        ("max_pairs=3.5", r"data\.max_pairs is 3\.5 \(float\); it has to be int \| None"),
        ("freeze_text=1", r"model\.freeze_text is 1 \(int\); it has to be bool"),
        ("vision=3", r"model\.vision is 3 \(int\); it has to be str \| dict \| None"),
        ("final_split=tst", r"training\.final_split is 'tst' .*'train', 'validation', 'test', 'none'"),
        ("model.vision={architecture: a", r"The value of 'model\.vision' is not valid YAML"),
        ("model.align_weight=-1", r"align_weight is -1: use a number of 0 or more"),
        ("cross_uniformity_weight=-1", r"model.cross_uniformity_weight is -1: use a number of 0 or more"),
        ("contrastive_loss=hinge", r"model.contrastive_loss is 'hinge': use one of softmax, sigmoid"),
        ("max_pairs=0", r"data\.max_pairs is 0; it must be at least 1"),
        ("phantom_size=31", r"data\.phantom_size is 31; it must be at least 32"),
        ("brightness=-0.5", r"data\.brightness is -0\.5; it must be at least 0 and below 1"),
        ("phantom_size=100000", r"data\.phantom_size is 100000; it must be at most 4096"),
        (
            "logit_scale_init_value=1e308",
            r"model\.logit_scale_init_value is 1e\+308 but .* at or below the cap",
        ),
        ("logit_scale_init_value=.nan", r"model\.logit_scale_init_value is nan but max_logit_scale is 100"),
        ("max_logit_scale=.inf", r"model\.max_logit_scale is inf: use a finite number above 0"),
        ("captioning.noise=.nan", r"captioning\.noise is nan; it must be 0 or more"),
        (f"vision=a/{'é' * 128}", r"model\.vision is 'a/é.*: no file, folder or Hub id has a name of 256 bytes"),
        ("projection_dim=1000000000", r"model\.projection_dim is 1000000000: it is a dimension, 1 .* to 65536"),
        ("projection_hidden_dim=0", r"model\.projection_hidden_dim is 0: it is a dimension"),
        ("projection_hidden_dim={text: 1e99}", r"model\.projection_hidden_dim.text is 1e\+99: it is a dimension"),
        ("text={hiden_size: 48}", r"model\.text: unknown key 'hiden_size': did you mean 'hidden_size'\?"),
        ("text={hidden_size: wide}", r"model\.text: .*'hidden_size' expected int, got str"),
        ("text={model_type: gpt2}", r"model\.text\.model_type is 'gpt2': a tower from scratch is of type 'bert'"),
        ("vision={model_args: {}}", r"model\.vision describes a tower without `architecture`"),
        ("vision={architecture: eva02_tinny_patch14_224}", r"did you mean 'eva02_tiny_patch14_224'\?"),
        ("vision={architecture: resnet18, model_arg: {}}", r"unknown key 'model_arg': did you mean 'model_args'\?"),
    ],
)
def test_wrong_overrides(word, message):
    with pytest.raises(ValueError, match=message):
        load_config([], [word])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["neftune_noise_alpha=.nan"], "neftune_noise_alpha is nan: use a finite number, 0 or more"),
        (
            ["dataloader_persistent_workers=true"],
            "persistent_workers is True, .*_workers is 0: .* to false",
        ),
        (
            ["dataloader_multiprocessing_context=spawn"],
            "processing_context is spawn, .*_workers is 0: .* to null",
        ),
        (
            ["dataloader_multiprocessing_context=x", "dataloader_num_workers=1"],
            "processing_context is 'x': use one of .*spawn",
        ),
    ],
)
def test_wrong_settings_of_the_trainer(words, message, tmp_path):
    if not hasattr(TrainingArguments, words[0].partition("=")[0]):
        pytest.skip("this transformers has no such field")
    with pytest.raises(ValueError, match=f"training..*{message}"):
        load_config([], [*words, f"output_dir={tmp_path}"]).training_arguments()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.text.hiden_size=1"], r"model\.text: unknown key 'hiden_size': did you mean 'hidden_size'\?"),
        (["model.vison.architecture=x"], r"unknown key 'vison' in section 'model': did you mean 'vision'\?"),
        (["txt.hidden_size=1"], r"unknown section 'txt' in 'txt\.hidden_size'"),
        (["projection_dim.x=1"], r"model\.projection_dim is \{'x': 1\} \(dict\); it has to be int"),
        (
            ["vision=timm/name", "vision.depth=1"],
            r"model\.vision is 'timm/name', which has no key 'depth'",
        ),
    ],
)
def test_wrong_keys_inside_a_field(words, message):
    with pytest.raises(ValueError, match=message):
        load_config([], words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainig: {seed: 1}", r"base\.yaml: unknown section 'trainig': did you mean 'training'\?"),
        ("training: {sed: 1}", r"base\.yaml: unknown key 'sed' in section 'training': did you mean 'seed'\?"),
        ("training: 3", r"base\.yaml: section 'training' has to hold `field: value` lines"),
        ("training: {seed: soon}", r"base\.yaml: training\.seed is 'soon' \(str\); it has to be int"),
        ("- a\n- b", r"base\.yaml has to hold the sections model, data, training"),
        ("training: {seed: 1", r"base\.yaml is not valid YAML: .*line 1"),
    ],
)
def test_wrong_files(write, text, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_config([write(text)])


def test_a_file_that_a_run_has_left_is_named_if_it_is_wrong_itself(write):
    path = write("model: {vision: {architecture: resnet18, model_args: de}}", "train_config.yaml")
    with pytest.raises(ValueError, match=r"train_config\.yaml: model\.vision\.model_args is 'de'"):
        load_saved_config(path, ["seed=1"])
    assert load_saved_config(path, ["model.vision.model_args={}"]).model.vision["model_args"] == {}
    path = write("training: {seed: 3}", "train_config.yaml")
    with pytest.raises(ValueError, match="^model.projection_dim is 0"):
        load_saved_config(path, ["projection_dim=0"])


def test_missing_file_and_the_nearest_one(write, tmp_path):
    write(BASE, "radiology.yaml")
    with pytest.raises(FileNotFoundError, match=r"no config file .*radiolgy\.yaml\. Did you mean .*radiology\.yaml\?"):
        load_config([tmp_path / "radiolgy.yaml"])
    with pytest.raises(
        FileNotFoundError, match="Those that come with the package are biomedclip.yaml, captioning.yaml, "
    ):
        load_config([tmp_path / "nothing" / "alike.yaml"])


@pytest.mark.parametrize("name", ["max_steps", "training.max_steps", "vision"])
def test_a_field_without_a_value_is_no_file(name):
    with pytest.raises(FileNotFoundError, match=rf"no config file {name}\. Did you mean {name}=VALUE\?"):
        load_config([name])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.source=3", r"data.source is 3 \(int\); it has to be str | list"),
        ("data.source={name: a}", "data.source is .*dict"),
        ("data.source=[]", "a list of at least one"),
        ("data.source=[{name: a, source: b, max_pairs: many}]", "entry 0 of data.source: data.max_pairs is 'many'"),
        ("data.source=[b, {source: a, label_columns: 3}]", "entry 1 of data.source: data.label_columns is 3"),
        ("data.source=[{source: [a]}]", r"data.source\[0\] is .* it must be a mapping"),
        ("data.source=[{source: a, licence: cc0}]", "'a': unknown key 'licence': did you mean 'license'?"),
        ("data.source=[{source: a, on_missing: maybe}]", "entry 0 of data.source: data.on_missing is 'maybe'"),
    ],
)
def test_nonsense_in_a_list_of_sources(word, message):
    with pytest.raises(ValueError, match=message):
        load_config([], [word])
