"""LoRA in the language model: where it may go, how it is drawn, what it costs, and its merging."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dsasr import config, recipe
from dsasr.build import Builder
from dsasr.checkpoint import tensor_fragments, zero_partition
from dsasr.checkpoint.locate import open_run_checkpoint
from dsasr.checkpoint.manifest import FORMAT, MANIFEST
from dsasr.checkpoint.tensor_fragments import Fragment, FragmentReader
from dsasr.data.batch import Batch
from dsasr.inference import export
from dsasr.inference.model_from_run import RunModel
from dsasr.inference.recognizer import Recognizer
from dsasr.model import lora
from dsasr.model.adaptors.mlp import MlpAdaptor
from dsasr.model.adaptors.protocol import AdaptorConfig
from dsasr.model.encoders.conformer import Encoder, EncoderConfig
from dsasr.model.llm import LlmConfig
from dsasr.model.lora import LoraConfig
from dsasr.model.speech_llm import SpeechLLM
from dsasr.planning import cluster_sizing, flops, timeline
from dsasr.planning.memory import Machine, step_memory
from dsasr.planning.model_parts import count_parts
from dsasr.stages import StageConfig
from dsasr.training import preflight
from dsasr.utils.errors import UserError

PROGRAMS = Path(__file__).parent.parent / "programs"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_llm() -> Qwen3ForCausalLM:
    torch.manual_seed(1)
    shape = Qwen3Config(
        vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    return Qwen3ForCausalLM(shape).eval()


def fill(llm, seed: int = 0) -> None:
    """Matrices as training might leave them: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in lora.adapters(llm):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def write_recipe(tiny: Path, folder: Path, **lora_values) -> Path:
    values = config.read_recipe(str(tiny))
    values["run"] = str(folder / "run")
    values["model"]["lora"] = {"rank": 3, "alpha": 6, **lora_values}
    adaptor = {"adaptor": 1e-3}
    stages = [s for s in values["stages"] if s["name"] in ("pretrain", "align")]
    for name, trains in (
        ("ia_sft", {**adaptor, "lora": 1e-2}),
        ("only", {"lora": 1e-2}),
        ("joint", {"encoder": 1e-3, **adaptor, "lora": 1e-2}),
    ):
        stages.append({"name": name, "branch": "sft", "trains": trains, "steps": 6})
    values["stages"] = stages
    path = folder / "lora.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def lora_recipe(tiny, tmp_path_factory) -> Path:
    """The tiny recipe with LoRA."""
    return write_recipe(tiny, tmp_path_factory.mktemp("lora"))


# -- where it goes -----------------------------------------------------------------------------


def test_all_linear_layers_of_the_blocks_or_the_ones_named():
    llm = make_llm()
    names = lora.targeted(llm, LoraConfig())
    assert len(names) == 2 * 7 and {n.rpartition(".")[2] for n in names} == set(ALL)
    assert not any("lm_head" in n or "embed" in n for n in names)
    some = lora.targeted(llm, LoraConfig(targets=("q_proj", "down_proj")))
    assert sorted(some) == sorted(
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [("lm_head", "none of the linear"), ("embed_tokens", "none of"), ("q_prj", "mean 'q_proj'")],
)
def test_other_targets_are_refused(target, message):
    with pytest.raises(UserError, match=message):
        lora.inject(make_llm(), LoraConfig(targets=(target,)))


def test_all_layers_are_refused_where_experts_are_stacked_and_the_covered_share_is_said():
    moe = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen3_moe", vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=8,
        )
    )  # fmt: skip
    with pytest.raises(UserError, match=r"\d\d% .*stacked .*mlp.experts.gate_up_proj.* q_proj"):
        lora.check(moe, LoraConfig())
    named = LoraConfig(targets=("q_proj", "v_proj"))
    lora.check(moe, named)
    # A layer: q and o 16·32, k and v 16·16, router 4·16, experts 4·3·8·16.
    share = 16 * (32 + 16) / (16 * 96 + 64 + 4 * 3 * 8 * 16)
    assert lora.coverage(moe, named) == (
        f"LoRA adapts 4 linear layers (q_proj, v_proj): {share:.1%} of the weights of the language "
        "model's blocks"
    )
    assert "14 linear layers" in lora.coverage(make_llm(), LoraConfig())
    assert "100.0%" in lora.coverage(make_llm(), LoraConfig())


def test_a_model_that_peft_refuses_is_told_in_a_line_and_left_as_it_was():
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "mamba2", vocab_size=41, hidden_size=16, state_size=8, num_hidden_layers=1,
            num_heads=4, head_dim=8, n_groups=1,
        )
    )  # fmt: skip
    before = set(dict(mamba.named_parameters()))
    with pytest.raises(UserError, match=r"model\.lora: peft refuses .*out_proj") as caught:
        lora.check(mamba, LoraConfig())
    assert "\n" not in str(caught.value)
    lora.check(mamba, LoraConfig(targets=("in_proj",)))
    assert set(dict(mamba.named_parameters())) == before


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"alpha": 0.0}, {"alpha": float("inf")}, {"dropout": 1.0}]
)
def test_settings_that_make_no_sense(values):
    with pytest.raises(UserError, match="LoraConfig"):
        LoraConfig(**values)


def test_without_peft_the_recipe_says_what_to_install(monkeypatch, lora_recipe):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'dsasr\[lora\]'"):
        preflight.check(Builder(recipe.load(str(lora_recipe))))


def test_names_of_the_base_weights_stay_and_the_model_is_the_same_at_first():
    llm, ids = make_llm(), torch.tensor([[5, 9, 3, 7]])
    plain = dict(zero_partition.named_parameters(llm))
    with torch.no_grad():
        before = llm(ids).logits
    lora.inject(llm, LoraConfig(rank=3))
    for name, parameter in lora.adapters(llm):
        generator = torch.Generator().manual_seed(len(name))
        parameter.data.copy_(lora.initial(name, tuple(parameter.shape), generator))
    named = dict(zero_partition.named_parameters(llm))
    base = {n: p for n, p in named.items() if not lora.is_adapter(n)}
    assert base.keys() == plain.keys() and all(base[n] is plain[n] for n in plain)
    assert len(named) == len(plain) + 2 * 14
    assert isinstance(llm, Qwen3ForCausalLM) and type(llm.lm_head).__name__ == "Linear"
    with torch.no_grad():
        assert torch.equal(llm(ids).logits, before), "B is zero at first"


def test_matrices_do_not_depend_on_each_other_or_the_weights(lora_recipe):
    cfg = recipe.load(str(lora_recipe))
    first, second = Builder(cfg).speech_llm(), Builder(cfg).speech_llm()
    drawn = dict(lora.adapters(first.llm))
    assert all(torch.equal(p, drawn[n]) for n, p in lora.adapters(second.llm))
    # Fewer targets: the others are drawn as before.
    few = dataclasses.replace(cfg.model.lora, targets=("o_proj",))
    fewer = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, lora=few))
    left = dict(lora.adapters(Builder(fewer).speech_llm().llm))
    assert 0 < len(left) < len(drawn) and all(torch.equal(p, drawn[n]) for n, p in left.items())
    reseeded = dict(lora.adapters(Builder(dataclasses.replace(cfg, seed=2)).speech_llm().llm))
    for name, matrix in drawn.items():
        if ".lora_B." in name:
            assert not matrix.any()
            continue
        assert not torch.equal(matrix, reseeded[name])
        bound = matrix.shape[1] ** -0.5
        assert 0.7 * bound < matrix.abs().max() <= bound
        assert float(matrix.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.3)
    plain = Builder(dataclasses.replace(cfg, model=dataclasses.replace(
        cfg.model, lora=None), stages=cfg.stages[:2])).speech_llm()  # fmt: skip
    with_lora = dict(zero_partition.named_parameters(first))
    assert all(torch.equal(p, with_lora[n]) for n, p in zero_partition.named_parameters(plain))


# -- stages ------------------------------------------------------------------------------------


def test_parts_and_their_parameters(lora_recipe):
    model = Builder(recipe.load(str(lora_recipe))).speech_llm()
    parts = {name: lora.part(model, name) for name in ("encoder", "adaptor", "llm", "lora")}
    ids = [id(p) for params in parts.values() for p in params]
    assert len(set(ids)) == len(ids) == len(list(model.parameters()))
    assert len(parts["lora"]) == 2 * 7 and lora.part(model, "ctc") == []


def test_a_stage_trains_one_of_both_and_needs_its_settings(tiny):
    with pytest.raises(UserError, match="both 'llm' and 'lora'"):
        StageConfig("x", "sft", {"llm": 1e-3, "lora": 1e-3}, steps=3)
    with pytest.raises(UserError, match="unknown part 'lora'"):
        StageConfig("x", "pretrain", {"lora": 1e-3}, steps=3)
    trains = "stages.ia_sft.trains={adaptor: 1.0e-3, lora: 1.0e-3}"
    with pytest.raises(UserError, match=r"give model\.lora, such as"):
        recipe.load(str(tiny), [trains])
    with pytest.raises(UserError, match="no stage trains 'lora'"):
        recipe.load(str(tiny), ["model.lora.rank=4"])
    cfg = recipe.load(str(tiny), [trains, "model.lora.rank=4"])
    assert cfg.parts("sft") == ("encoder", "adaptor", "llm", "lora")
    with pytest.raises(UserError, match="none of the linear layers"):
        bad = recipe.load(str(tiny), [trains, "model.lora.targets=[lm_head]"])
        preflight.check(Builder(bad))


def small_model(dropout: float, checkpoint: bool = False) -> SpeechLLM:
    llm = make_llm()
    lora.inject(llm, LoraConfig(rank=3, dropout=dropout))
    fill(llm)
    torch.manual_seed(2)
    encoder = Encoder(EncoderConfig(width=12, layers=1, heads=2, ffn=24, kernel=3, mels=12))
    adaptor = MlpAdaptor(AdaptorConfig(hidden=10), 12, 16)
    cfg = LlmConfig(activation_checkpointing=checkpoint)
    return SpeechLLM(encoder, adaptor, llm, [1, 2], [3], 0, cfg).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    return Batch.blank(
        torch.randn(2, 70, 12, generator=generator).double(),
        feature_lengths_B=torch.tensor([70, 52]),
        tokens_BU=torch.tensor([[7, 9, 8, 4], [11, 4, 0, 0]]),
        token_lengths_B=torch.tensor([4, 2]),
        seed=5,
    )


def train_only(model, *parts: str) -> None:
    model.requires_grad_(False)
    for name in parts:
        for parameter in lora.part(model, name):
            parameter.requires_grad_(True)
    model.train()


@pytest.mark.parametrize("parts", [("lora",), ("adaptor", "lora"), ("encoder", "adaptor", "lora")])
def test_gradients_reach_the_matrices_and_nothing_frozen(batch, parts):
    model = small_model(dropout=0.0)
    train_only(model, *parts)
    model(batch).loss.backward()
    for name in ("encoder", "adaptor", "llm", "lora"):
        grads = [p.grad for p in lora.part(model, name)]
        if name in parts:
            assert all(g is not None for g in grads) and any(g.any() for g in grads), name
        else:
            assert all(g is None for g in grads), name


def test_the_gradient_is_that_of_differences(batch):
    model = small_model(dropout=0.0)
    train_only(model, "lora")
    model.encoder.eval()
    model(batch).loss.backward()
    name, matrix = next((n, p) for n, p in lora.adapters(model.llm) if "lora_B" in n)
    with torch.no_grad():
        index, step = (2, 1), 3e-3
        matrix[index] += step
        up = model(batch).loss
        matrix[index] -= 2 * step
        down = model(batch).loss
    # The loss is a float32 kernel's.
    assert float(matrix.grad[index]) == pytest.approx(float(up - down) / (2 * step), rel=0.02), name


def test_dropout_is_the_matrices_own_and_only_while_they_train(batch):
    model = small_model(dropout=0.5)
    calm = float(model.eval()(batch).loss)
    for parts, noisy in ((("adaptor",), False), (("llm",), False), (("lora",), True)):
        train_only(model, *parts)
        assert (float(model(batch).loss) != pytest.approx(calm, abs=1e-9)) == noisy, parts
    again = float(model(batch).loss)
    assert float(model(batch).loss) == again, "seeded by the batch"
    assert float(model.eval()(batch).loss) == calm


def test_recomputed_layers_give_the_same_gradients(batch):
    gradients = []
    for checkpoint in (False, True):
        model = small_model(0.5, checkpoint)
        train_only(model, "lora")
        model(batch).loss.backward()
        gradients.append([p.grad for _, p in lora.adapters(model.llm)])
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*gradients, strict=True))


# -- what it takes -----------------------------------------------------------------------------


def test_sizes_work_and_memory_are_counted(lora_recipe):
    cfg = recipe.load(str(lora_recipe))
    model = Builder(cfg).speech_llm()
    adapter_parameters = sum(p.numel() for p in lora.part(model, "lora"))
    parts = count_parts(cfg)
    assert parts["lora"].parameters == adapter_parameters
    assert parts["llm"].parameters == sum(p.numel() for p in lora.part(model, "llm"))
    shape = flops.LlmShape.of(model.llm)
    assert shape == parts["llm"].shape and shape.adapters == adapter_parameters
    table = timeline.stage_table(cfg, ranks=1)
    assert "trains   lora" in table and "frozen   encoder, llm" in table
    # By hand: bf16 weights of all, 2 + 12 bytes more of what trains.
    sizes = {name: part.parameters for name, part in parts.items()}
    trained = sizes["encoder"] + sizes["adaptor"] + sizes["lora"]
    memory = step_memory(cfg, cfg.stages[-1], Machine(nodes=1, gpus=2), parts)
    assert memory["weights"] == pytest.approx(2 * (trained + sizes["llm"]) / 2 / 1e9)
    assert memory["gradients"] == pytest.approx(2 * trained / 2 / 1e9)
    assert memory["optimizer"] == pytest.approx(12 * trained / 2 / 1e9)
    saved = 14 * (trained + sizes["encoder"] + sizes["ctc"]) + 2 * sizes["llm"]
    assert cluster_sizing.checkpoint_bytes(cfg, parts) == saved


def test_the_work_of_a_step_is_torchs(lora_recipe):
    from torch.utils.flop_counter import FlopCounterMode

    llm = make_llm()
    llm.set_attn_implementation("eager")
    lora.inject(llm, LoraConfig(rank=3))
    shape = flops.LlmShape.of(llm)
    embeds = torch.randn(2, 11, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        llm.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state.sum().backward()
    parts = {
        "adaptor": flops.PartFlops(1.0),
        "lora": flops.lora(shape, [11, 11]),
        "llm": flops.llm(shape, [11, 11], causal=False),
    }
    work = flops.step_flops(parts, ["adaptor", "lora"])
    rotary = counter.get_total_flops() - work["lora"].needed - work["llm"].needed
    assert rotary in (0, 2 * 11 * 4)  # 0 but for older transformers, which take a matrix product
    alone = flops.step_flops(parts, ["lora"])
    assert alone["llm"].backward == work["llm"].backward and not alone["adaptor"].backward


# -- out ---------------------------------------------------------------------------------------


def write_checkpoint(model, folder: Path, world_size: int, trained: tuple[str, ...]) -> None:
    """A checkpoint that ``world_size`` ranks wrote: weights, and states of ``trained`` parts."""
    training = {id(p) for name in trained for p in lora.part(model, name)}
    generator = torch.Generator().manual_seed(7)
    folder.mkdir(parents=True)
    ranks: list[dict] = [{} for _ in range(world_size)]
    for name, parameter in zero_partition.named_parameters(model):
        flat = parameter.detach().reshape(-1)
        kinds = {name: flat}
        if id(parameter) in training:
            kinds[f"master/{name}"] = flat
            for kind in zero_partition.MOMENTS:
                kinds[f"{kind}/{name}"] = torch.rand(flat.shape, generator=generator)
        share = -(-flat.numel() // world_size)
        for key, values in kinds.items():
            for rank in range(world_size):
                low = min(rank * share, flat.numel())
                ranks[rank][f"sft/{key}"] = Fragment(
                    tuple(parameter.shape), low, values[low : low + share]
                )
    for name, buffer in zero_partition.persistent_buffers(model):
        ranks[0][f"sft/{name}"] = Fragment(tuple(buffer.shape), 0, buffer.reshape(-1))
    files = {f"rank-{r:05d}.safetensors": part for r, part in enumerate(ranks)}
    digests = {
        name: tensor_fragments.write_file(folder / name, part) for name, part in files.items()
    }
    manifest = {"format": FORMAT, "steps": 42, "files": digests}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def trained(lora_recipe) -> Path:
    """A run folder whose checkpoint holds matrices that have been trained."""
    cfg = recipe.load(str(lora_recipe))
    model = Builder(cfg).speech_llm()
    fill(model.llm)
    run = Path(cfg.run)
    write_checkpoint(model, run / "checkpoints" / "step-0000000042", 3, ("adaptor", "lora"))
    (run / "recipe.yaml").write_text(config.dump(cfg))
    return run


def logits(llm) -> torch.Tensor:
    with torch.no_grad():
        return llm.eval()(torch.tensor([[5, 9, 3, 7, 2]])).logits


def test_exported_it_is_a_plain_model_that_says_the_same(trained, tmp_path):
    """Merged and unmerged agree to 1e-5 of the largest logit in float32."""
    run = RunModel.from_run(trained)
    ours = run.model.llm
    folder = export.export_run(run.builder, open_run_checkpoint(trained), tmp_path / "model")
    llm, report = AutoModelForCausalLM.from_pretrained(
        folder / "llm", trust_remote_code=False, output_loading_info=True, dtype=torch.float32
    )
    assert isinstance(llm, Qwen3ForCausalLM)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected, plain = (
        logits(ours),
        AutoModelForCausalLM.from_pretrained(run.builder.recipe.model.llm.path),
    )
    scale = float(expected.abs().max())
    assert float((logits(llm) - expected).abs().max()) < 1e-5 * scale
    assert float((logits(plain) - expected).abs().max()) > 0.05 * scale, "the matrices do something"
    exported_run = export.load_export(folder)
    state = exported_run.model.state_dict()
    assert not any("lora" in name for name in state)
    assert float((logits(exported_run.model.llm) - expected).abs().max()) < 1e-5 * scale
    assert not (folder / "adapter").exists()
    from_run, exported = Recognizer.from_pretrained(trained), Recognizer.from_pretrained(folder)
    wave = (0.3 * torch.sin(torch.arange(19_200) * 0.17)).numpy()
    soundfile.write(tmp_path / "a.wav", wave, 16_000)
    a, b = (r.transcribe(tmp_path / "a.wav") for r in (from_run, exported))
    assert [s.text for s in a.segments] == [s.text for s in b.segments]


def test_rounded_after_the_sum(trained, tmp_path):
    build = RunModel.from_run(trained).builder
    reader = open_run_checkpoint(trained)
    folder = export.export_run(build, reader, tmp_path / "model", torch.bfloat16)
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm")
    name = "model.layers.0.mlp.down_proj"
    weight, a, b = (
        reader.whole(f"sft/llm.{name}{end}").double()
        for end in (".weight", ".lora_A.default.weight", ".lora_B.default.weight")
    )
    exact = (weight + 2.0 * b @ a).float()
    rounded = llm.get_submodule(name).weight
    assert rounded.dtype is torch.bfloat16
    # One rounding: never further away than half of a bfloat16's last place.
    assert ((rounded.float() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def test_the_adapter_by_itself_is_pefts(trained, tmp_path):
    from peft import PeftModel

    run = RunModel.from_run(trained)
    folder = export.export_run(
        run.builder, open_run_checkpoint(trained), tmp_path / "model", adapter=True
    )
    base = AutoModelForCausalLM.from_pretrained(run.builder.recipe.model.llm.path)
    llm = PeftModel.from_pretrained(base, folder / "adapter")
    assert torch.equal(logits(llm), logits(run.model.llm))
    assert str(trained.parent) not in (folder / "adapter" / "adapter_config.json").read_text()
    assert torch.allclose(logits(llm.merge_and_unload()), logits(run.model.llm), atol=1e-5)


def test_what_cannot_be_exported_is_said(trained, tmp_path):
    build = RunModel.from_run(trained).builder
    reader, cfg = open_run_checkpoint(trained), build.recipe
    later = StageConfig("late", "sft", {"llm": 1e-4}, steps=3)
    with_late_stage = Builder(dataclasses.replace(cfg, stages=(*cfg.stages, later)))
    with pytest.raises(UserError, match="'late' trains the language model itself"):
        export.export_run(with_late_stage, reader, tmp_path / "model", adapter=True)
    none = dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, lora=None), stages=cfg.stages[:2]
    )
    with pytest.raises(UserError, match=r"disagree on model\.lora"):
        export.export_run(Builder(none), reader, tmp_path / "model")
    assert not list(tmp_path.iterdir())


# -- trained -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.launcher
def test_stages_under_zero_3(launch, lora_recipe, trained, tmp_path):
    cfg = recipe.load(str(lora_recipe))
    (tmp_path / "other_world_size").symlink_to(trained / "checkpoints" / "step-0000000042")
    process = launch(PROGRAMS / "lora_laws.py", lora_recipe, tmp_path)
    assert process.returncode == 0, process.stdout[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    for stage, (changed, trains) in report["frozen"].items():
        assert changed == trains, f"{stage} trains {trains}, and {changed} changed"
    assert report["sharded"] and report["resumed"] and report["continued"] and report["other_world"]
    model = Builder(cfg).speech_llm()
    expected = {n for n, _ in zero_partition.named_parameters(model, "adaptor.")}
    expected |= {f"llm.{n}" for n, _ in lora.adapters(model.llm)}
    assert {name.partition("/")[2] for name in report["optimizer"]} == expected
    # What two ranks saved in bf16, read by one: the language model's own weights are the folder's.
    reader = FragmentReader(tmp_path / "saved")
    for name, parameter in zero_partition.named_parameters(model, "llm."):
        low = parameter.detach().to(torch.bfloat16)
        assert torch.equal(reader.whole(f"sft/{name}"), low) != lora.is_adapter(name), name
