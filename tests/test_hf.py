"""Models of Hugging Face with factorize_ and Spectron, in a Trainer that is resumed: bit for bit, or refused
in words. Skipped where transformers is not installed (tests/requirements-compare.txt)."""

import json

import pytest
import torch

from model import FactorizedLinear, factorize_
from spectron import Spectron

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SIZE = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE))


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZE, hidden_dropout_prob=0.0,
                                                                attention_probs_dropout_prob=0.0))


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0))


def factorized(make):
    """The model and its pairs, by the retry that a refusal names."""
    torch.manual_seed(0)
    model = make()
    try:
        return model, factorize_(model, 0.25)
    except ValueError as error:
        skip = json.loads(str(error).rsplit("skip=", 1)[1].replace("'", '"'))
        return model, factorize_(model, 0.25, skip=skip)


def trained(make, out, resume=None):
    model, pairs = factorized(make)
    texts = torch.randint(0, 50, (16, 8), generator=torch.Generator().manual_seed(1))
    dataset = [{"input_ids": text, "labels": text} for text in texts]
    arguments = transformers.TrainingArguments(
        str(out), max_steps=6, save_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        disable_tqdm=True)
    trainer = transformers.Trainer(model, arguments, train_dataset=dataset,
                                   optimizers=(Spectron(pairs, lr=0.05), None))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train(resume_from_checkpoint=resume)
    return start, {name: p.detach() for name, p in model.named_parameters()}, model


@pytest.mark.parametrize("make", [llama, bert, t5])
def test_a_resumed_trainer_ends_at_the_same_weights(make, tmp_path):
    start, whole, model = trained(make, tmp_path / "whole")
    layers = {name for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear)}
    assert len(layers) >= 12
    assert all(not torch.equal(start[f"{name}.{x}"], whole[f"{name}.{x}"]) for name in layers for x in "AB")
    _, resumed, _ = trained(make, tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_gpt2_whose_layers_are_conv1d_is_refused_by_their_name():
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="lm_head"):
        factorize_(model, 0.25)
    with pytest.raises(ValueError, match="Conv1D"):
        factorize_(model, 0.25, skip=["lm_head"])
