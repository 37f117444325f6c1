"""Threads take turns on a model, and an interrupt leaves it as it was."""

import random
import signal
import threading
import time

import pytest
import torch

from architectures import D, bridge, fresh_bridge

ROWS = [(f"the cat sat on the mat {i}", " over the green hill") for i in range(4)]


def steering():
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(0, "all"): rl.SteeringVector(D)})
    with torch.no_grad():
        for parameter in reft.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0)).mul_(3)
    return reft


def lens():
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, rank=2)})
    reft.reset(0)
    return reft


def state(model):
    """Logits, hooks, modules, flags, attention, gradient mode: what an edit could leave behind."""
    root, gradients = model.original_model, torch.is_grad_enabled()
    with torch.no_grad():
        logits = root(torch.arange(1, 9)[None]).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    flags = [p.requires_grad for p in root.parameters()]
    return logits, hooks, [id(m) for m in root.modules()], flags, root.config._attn_implementation, gradients


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1:] == b[1:]


def calls(model, data, reft, trained):
    import reftlens as rl

    return {
        "fit": lambda: rl.fit(trained, model, data, steps=3, progress=False),
        "generate": lambda: rl.generate(reft, model, ["the cat", "a"], rl.Decoding(max_new_tokens=4)),
        "evaluate": lambda: rl.evaluate(reft, model, data, [0, 1], progress=False),
        "in full": lambda: rl.evaluate(reft, model, data, [0, 1], reuse=False, progress=False),
        "effects": lambda: rl.effects(trained, model, data, of="positions", progress=False),
        "prefill": lambda: rl.generation.prefill(trained, model, ["the cat sat"]),
    }


def interrupted(call, pause):
    """Whether an interrupt that comes after some time was raised; it is sent to the main thread, as Ctrl-C is."""

    here = threading.get_ident()

    def send():
        time.sleep(pause)
        signal.pthread_kill(here, signal.SIGINT)

    thread = threading.Thread(target=send)
    try:
        thread.start()
        call()
        thread.join()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        thread.join()


def interrupts(count, seed):
    """So many interrupts at random times in each call; the model is looked at after each."""
    import reftlens as rl

    model = fresh_bridge("llama")
    data, before = rl.encode(model, [rl.Example(*row) for row in ROWS]), state(model)
    generator, raised = random.Random(seed), 0
    for name, call in calls(model, data, steering(), lens()).items():
        call()
        began = time.perf_counter()
        call()
        duration = time.perf_counter() - began
        for _ in range(count):
            try:
                raised += interrupted(call, generator.random() * duration)
            except KeyboardInterrupt:  # sent while the thread was waited for
                raised += 1
            assert same(state(model), before), name
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return raised


@pytest.fixture
def _default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_leaves_the_model_as_it_was(_default_handler):
    assert interrupts(8, seed=0) > 10


@pytest.mark.slow
def test_many_interrupts_leave_the_model_as_it_was(_default_handler):
    """`python tests/test_exclusive.py` sends five thousand of them."""
    assert interrupts(50, seed=1) > 100


def test_an_interrupt_waits_for_the_end_of_a_pass(_default_handler):
    from reftlens.bridge.exclusive import exclusive

    model, after = bridge("gpt2"), []
    with pytest.raises(KeyboardInterrupt):
        with exclusive(model):
            signal.raise_signal(signal.SIGINT)
            after.append("the rest of the block")
        after.append("what follows it")
    assert after == ["the rest of the block"]
    with pytest.raises(KeyboardInterrupt), exclusive(model):
        signal.raise_signal(signal.SIGINT)
        with exclusive(model):
            after.append("inner")
        after.append("between")
    assert after[1:] == ["inner"]
    with exclusive(model):
        pass  # nothing waits any more


def test_an_error_of_the_objective_leaves_nothing_on_the_model():
    import reftlens as rl

    model = fresh_bridge("llama")
    data, before = rl.encode(model, [rl.Example(*row) for row in ROWS]), state(model)

    def broken(logits, batch):
        raise ArithmeticError("no loss")

    for reuse in (True, False):
        with pytest.raises(ArithmeticError) as error:
            rl.fit(lens(), model, data, steps=1, objective=broken, reuse=reuse, progress=False)
        assert error.value.__traceback__ is not None and same(state(model), before)


def turns(threads, count):
    """Texts written by several threads at once on one model, some edited and some not; each with what it should be."""
    import reftlens as rl

    model, reft, decoding = fresh_bridge("llama"), steering(), rl.Decoding(max_new_tokens=3)
    prompts = ["the cat sat on", "a dog ran over the hill"]
    expected = {edited: rl.generate(reft if edited else None, model, prompts, decoding).ids for edited in (True, False)}
    streamed = "".join(rl.generation.stream(reft, model, prompts[0], decoding))
    assert expected[True] != expected[False]
    problems = []

    def work(number):
        try:
            for turn in range(count):
                edited = bool((number + turn) % 2)
                ids = rl.generate(reft if edited else None, model, prompts, decoding).ids
                if ids != expected[edited]:
                    problems.append(f"another text, edited: {edited}")
                if turn % 10 == 0 and "".join(rl.generation.stream(reft, model, prompts[0], decoding)) != streamed:
                    problems.append("another stream")
        except Exception as error:
            problems.append(repr(error))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return problems


@pytest.mark.parametrize("threads", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_threads_take_turns(threads):
    assert turns(threads, 10) == []


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 4])
def test_threads_take_turns_two_hundred_times(threads):
    assert turns(threads, 200) == []


def test_one_model_does_not_wait_for_another():
    import reftlens as rl
    from reftlens.bridge.exclusive import exclusive

    first, second, done = bridge("llama"), bridge("gpt2"), []
    decoding = rl.Decoding(max_new_tokens=1)
    with exclusive(first):
        worker = threading.Thread(target=lambda: done.append(rl.generate(None, second, ["a"], decoding)))
        worker.start()
        worker.join(timeout=60)
        assert len(done) == 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    print(f"{interrupts(834, seed=2)} of {6 * 834} interrupts were raised; the model was as before after each")
