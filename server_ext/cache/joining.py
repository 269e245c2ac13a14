"""A branch is a decode step: requests that wait with one token to compute join the running batch.

SGLang 0.5.21 stops the running batch for a prefill pass of its own whenever a request begins, also
when all of its prefix but the last token is in the radix cache, as every branch of a tree is. Such
a pass costs about a decode step and computes one token. Here its batch, admitted and allocated by
SGLang itself, is put before the rows of the decode batch instead, as its mixed chunks do
(`ScheduleBatch.mix_with_running`), but as a plain decode step:

    waiting --admitted: prefill batch--> all of its requests have one token left, and others run?
                yes: one decode step for both       no: a prefill pass, as before

Only without SGLang's overlap schedule, which is a GPU's default: there it was never run.
"""

from __future__ import annotations

from typing import Any

import torch


class Passes:
    """Counts, since the scheduler began: prefill passes, and requests that needed none."""

    def __init__(self) -> None:
        self.prefill_passes = self.joined_requests = 0


def next_batch(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's `Scheduler.get_next_batch_to_run`: its plan, or one in which the new requests
    have joined the running ones."""
    plan = original(scheduler, *args, **kwargs)
    new, running = plan.batch_to_run, plan.running_batch
    if new is None or not new.forward_mode.is_extend():
        return plan
    passes = passes_of(scheduler)
    if not running.is_empty() and _can_join(scheduler, new, running):
        # finished requests leave, and some of the others if the pool has no room for their tokens
        running = scheduler.update_running_batch(running)
        if not running.is_empty():
            passes.joined_requests += len(new.reqs)
            joined = _joined(scheduler, new, running)
            return type(plan)(batch_to_run=joined, running_batch=joined)
        plan = type(plan)(batch_to_run=new, running_batch=running)
    passes.prefill_passes += 1
    return plan


def passes_of(scheduler: Any) -> Passes:
    """The scheduler's counts."""
    if not hasattr(scheduler, "ibtree_passes"):
        scheduler.ibtree_passes = Passes()
    return scheduler.ibtree_passes  # type: ignore[no-any-return]


def _can_join(scheduler: Any, new: Any, running: Any) -> bool:
    return (
        new.forward_mode.is_extend_without_speculative()
        and not new.forward_mode.is_mixed()
        and not scheduler.enable_overlap
        and running.spec_algorithm.is_none()
        and scheduler.chunked_req is None
        and new.chunked_req is None
        and new.input_embeds is None
        and new.replace_embeds is None
        and not new.is_prefill_only
        and not running.is_prefill_only
        and not new.has_grammar
        and not new.model_config.is_encoder_decoder
        and not scheduler.require_mlp_sync
        and not scheduler.enable_hisparse
        and all(_one_token(request) for request in new.reqs)
        and all(request.beam_group is None for request in running.reqs)
    )


def _one_token(request: Any) -> bool:
    wants_prompt = request.return_logprob and request.logprob_start_len not in (
        -1,
        len(request.origin_input_ids),
    )
    return (
        request.extend_range.length == 1
        and request.inflight_middle_chunks <= 0
        and not wants_prompt
        and request.beam_group is None
        and not request.kv.holds_mamba
        and request.multimodal_inputs is None
    )


def _joined(scheduler: Any, new: Any, running: Any) -> Any:
    """The new batch with the running one's rows behind its own; both have their slots for this
    step. Its first tokens are read from where SGLang staged them, the others' from the last step.
    """
    fill_logprobs = scheduler.batch_result_processor.logprob_result_processor
    for request in new.reqs:
        request.time_stats.set_prefill_finished_time()
        request.decode_batch_idx += 1
        if request.return_logprob:
            fill_logprobs._initialize_empty_logprob_containers(request)
    slots = torch.cat([new.out_cache_loc, running.out_cache_loc])
    decoding, decoding_cpu = running.req_pool_indices, running.req_pool_indices_cpu
    mode, full = running.forward_mode, running.batch_is_full
    new.merge_batch(running)
    new.out_cache_loc, new.forward_mode, new.batch_is_full = slots, mode, full
    new.mix_running_indices, new.mix_running_indices_cpu = decoding, decoding_cpu
    new.prefill_stats = new.decoding_reqs = new.extend_lens = new.prefix_lens = None
    new.extend_num_tokens = new.extend_logprob_start_lens = None
    new.extend_input_logprob_token_ids = None
    return new
