"""Run files, overrides and stored JSON, and the one-line errors for each thing a user can get wrong in them."""

import dataclasses
import json
import pathlib

import pytest
import reasoning_gym

from configs import loading
from configs.schema import OBJECTIVES, ConfigError, ModelConfig, Unit, to_dict
from ring_jax.model import num_params

SMALL = pathlib.Path(__file__).parent / "small_run.py"
REAL = {"ring_mini": 16_255_643_392, "ring_flash": 102_889_705_216, "ring_1t": 999_705_328_640}


@pytest.fixture(scope="module")
def small():
  return loading.load(SMALL)


def overridden(config, **texts):
  return loading.override(config, {name.replace("__", "."): text for name, text in texts.items()})


def closed_form(m: ModelConfig) -> int:
  """Parameters counted by hand, without the MTP layer."""
  attention = m.hidden_size * m.head_dim * 2 * (m.num_attention_heads + m.num_key_value_heads)
  norms = 2 * m.hidden_size + 2 * m.head_dim
  router = m.num_experts * (m.hidden_size + 1)
  experts = 3 * m.hidden_size * m.moe_intermediate_size * (m.num_experts + m.num_shared_experts)
  dense = 3 * m.hidden_size * m.intermediate_size
  layers = m.num_hidden_layers * (attention + norms) + m.first_k_dense_replace * dense
  return layers + m.num_moe_layers * (router + experts) + (2 * m.vocab_size + 1) * m.hidden_size


@pytest.mark.parametrize("name", REAL)
def test_real_sizes_have_the_published_parameter_counts(name):
  config = loading.load(f"configs/{name}.py")
  assert config.name == name
  assert closed_form(config.model) == REAL[name]
  assert num_params(config.model) == REAL[name]
  assert config.model.rotary_dim == 64
  assert (config.rl.optimizer.learning_rate, config.rl.objective.alpha, config.rl.objective.beta) == (2e-6, 0.5, 5.0)
  assert config.rollout.pool == 480 * config.rollout.group_size
  assert config.tokenizer.path and config.init
  for source in config.task.mixture:
    entry = reasoning_gym.create_dataset(source.name, size=1, seed=0, **source.options)[0]
    assert source.prompt.format(**entry).endswith("in \\boxed{}.")
    assert source.completion.format(**entry) == f"\\boxed{{{entry['answer']}}}"


def test_stored_json_gives_the_same_config_back(small):
  for config in (small, loading.load("configs/ring_tiny.py"), loading.load("configs/ring_1t.py")):
    stored = json.loads(json.dumps(to_dict(config)))
    assert loading.from_dict(stored) == config
    assert loading.model_from_dict(stored["model"]) == config.model


def test_overrides_of_every_kind(small):
  config = overridden(
    small,
    seed="3",
    name="x=y",
    init="",
    rl__optimizer__learning_rate="1e-5",
    rollout__unit="rollout",
    task__exact="False",
    task__mixture__0__weight="2",
    task__mixture__0__options='{"max_word_len": 4}',
    model__rope_scaling='{"factor": 2, "original_max_position_embeddings": 256}',
  )
  assert (config.seed, config.name, config.rl.optimizer.learning_rate) == (3, "x=y", 1e-5)
  assert config.rollout.unit is Unit.ROLLOUT and config.task.exact is False
  assert (config.task.mixture[0].weight, config.task.mixture[0].options) == (2.0, {"max_word_len": 4})
  assert config.task.mixture[0].name == small.task.mixture[0].name
  assert config.model.rope_scaling.factor == 2.0
  assert overridden(config, model__rope_scaling="none").model.rope_scaling is None
  one = overridden(small, task__mixture__0__options__max_word_len="4").task.mixture[0].options
  assert one == {**small.task.mixture[0].options, "max_word_len": 4}
  two = overridden(small, task__mixture='[{"name": "gcd"}, {"name": "lcm", "weight": 3}]').task.mixture
  assert [(source.name, source.weight) for source in two] == [("gcd", 1.0), ("lcm", 3.0)]


def test_objectives_have_names(small):
  for name, objective in OBJECTIVES.items():
    assert overridden(small, rl__objective=name).rl.objective == objective
  assert overridden(small, rl__objective='{"masking": "none", "weight": "one"}').rl.objective == OBJECTIVES["grpo"]
  fields = {"rl__objective__masking": "none", "rl__objective__weight": "truncated"}
  assert overridden(small, **fields).rl.objective == dataclasses.replace(
    small.rl.objective, masking="none", weight="truncated"
  )
  with pytest.raises(ConfigError, match=r"rl\.objective='tas': must be one of icepop, tis, .*, or a JSON object of"):
    overridden(small, rl__objective="tas")
  with pytest.raises(ConfigError, match=r"rl\.objective\.level=sequence contradicts rl\.advantage=gae"):
    overridden(small, rl__objective="gspo", rl__advantage="gae")


def test_overrides_are_judged_together(small):
  alone = {"rollout.max_tokens": "400"}
  with pytest.raises(ConfigError, match=r"^packing\.length=128: "):
    loading.override(small, alone)
  assert loading.override(small, alone | {"packing.length": "512"}).rollout.max_len == 420
  yarn = {"model.rope_scaling.factor": "4", "model.rope_scaling.original_max_position_embeddings": "128"}
  assert loading.override(small, yarn).model.rope_scaling.factor == 4.0


def test_derived_fields_follow_what_they_are_derived_from(small):
  base = overridden(small, rollout__pool="0")
  assert base.rollout.pool == base.rollout.slots == 128
  assert overridden(base, rollout__slots="64").rollout.pool == 64
  assert overridden(small, rollout__slots="64").rollout.pool == 256  # written in the file, so it stays
  assert overridden(base, rollout__slots="64", rollout__pool="99").rollout.pool == 99
  assert overridden(small, model__head_dim="32").model.rotary_dim == 16
  assert overridden(overridden(small, model__rotary_dim="4"), model__head_dim="32").model.rotary_dim == 4


@pytest.mark.parametrize(
  ("path", "text", "message"),
  [
    ("rollout.slotz", "1", "rollout.slotz: unknown field; did you mean slots?"),
    ("rolout.slots", "1", "rolout: unknown field; did you mean rollout or "),
    ("qqq", "1", "qqq: unknown field; known here: name, model, task, "),
    ("seed.x", "1", "seed.x: unknown field; seed is an integer"),
    ("seed", "1.5", "seed='1.5': must be an integer"),
    ("rl.optimizer.learning_rate", "fast", "rl.optimizer.learning_rate='fast': must be a number"),
    ("task.exact", "maybe", "task.exact='maybe': must be true or false"),
    ("rollout.unit", "token", "rollout.unit='token': must be one of group, rollout"),
    ("task.mixture.1.weight", "1", "task.mixture.1: no such entry; task.mixture has 1, counted from 0"),
    ("task.mixture", "gcd", "task.mixture='gcd': must be a JSON list (Expecting value: "),
    ("task.mixture", '[{"nam": "gcd"}]', "task.mixture.0.nam: unknown field; did you mean name?"),
    ("task.mixture.0.options", "[1]", "task.mixture.0.options=[1]: must be a JSON object"),
    ("rollout", "{}", "rollout.token_budget: is missing"),
    ("model.rope_scaling.factor", "2", "model.rope_scaling.original_max_position_embeddings: is missing"),
    ("rollout.slots", "0", "rollout.slots=0: must be at least 1"),
  ],
)
def test_override_errors(small, path, text, message):
  with pytest.raises(ConfigError) as caught:
    loading.override(small, {path: text})
  assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_an_override_of_a_whole_and_of_its_part_is_refused(small):
  with pytest.raises(ConfigError, match="another override replaces as a whole"):
    loading.override(small, {"model.rope_scaling": "none", "model.rope_scaling.factor": "2"})
  with pytest.raises(ConfigError, match="as a whole and in part"):
    loading.override(small, {"model.rope_scaling.factor": "2", "model.rope_scaling": "none"})


def test_stored_json_errors(small):
  for change, message in (
    ({"seed": "1"}, "seed='1': must be an integer"),
    ({"seed": True}, "seed=True: must be an integer"),
    ({"model": 3}, "model=3: must be a JSON object of ModelConfig's fields"),
    ({"sfft": {}}, "sfft: unknown field; did you mean sft?"),
  ):
    with pytest.raises(ConfigError) as caught:
      loading.from_dict(to_dict(small) | change)
    assert str(caught.value) == message
  without = {name: value for name, value in to_dict(small).items() if name != "model"}
  with pytest.raises(ConfigError, match=r"^model: is missing$"):
    loading.from_dict(without)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("x = 1\n", "config file {path}: has no function get_config()"),
    ("def get_config():\n  return 3\n", "config file {path}: get_config() returned a int, not a RunConfig"),
    ("def get_config():\n  x = 1\n  return x.y\n", "{path}:3: AttributeError: 'int' object has no attribute 'y'"),
    ("import nothing_like_it\n", "{path}:1: ModuleNotFoundError: No module named 'nothing_like_it'"),
    ("\ndef get_config(:\n", "{path}:2: SyntaxError: "),
    (
      "from configs.schema import PackingConfig\n\ndef get_config():\n  return PackingConfig(0, 1)\n",
      "{path}:4: packing: length=0 and rows=1 are too small",
    ),
  ],
)
def test_file_errors(tmp_path, text, message):
  path = tmp_path / "run.py"
  path.write_text(text)
  with pytest.raises(ConfigError) as caught:
    loading.load(path)
  assert str(caught.value).startswith(message.format(path=path)) and "\n" not in str(caught.value)


def test_missing_files(tmp_path):
  with pytest.raises(ConfigError, match="does not exist"):
    loading.load(tmp_path / "none.py")
  with pytest.raises(ConfigError, match="is a folder"):
    loading.load(tmp_path)
  (tmp_path / "run.txt").write_text("")
  with pytest.raises(ConfigError, match=r"must be a Python file"):
    loading.load(tmp_path / "run.txt")
