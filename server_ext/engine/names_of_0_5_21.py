"""The names of SGLang 0.5.21 that names.py checks, by the module or class below `sglang`."""

from __future__ import annotations

SGLANG = "0.5.21"

CALLED = {
    "srt.server_args": {
        "prepare_server_args": "(argv)",
    },
    "srt.server_args.ServerArgs": {
        "resolve_once": "(self)",
        "resolved_dict": "(self)",
    },
    "srt.configs.model_config.ModelConfig": {
        "from_server_args": (
            "(server_args, model_path=, model_revision=, is_draft_model=, context_length=, "
            "**kwargs)"
        ),
    },
    "srt.entrypoints.engine.Engine": {
        "__init__": "(self, **kwargs)",
        "async_generate": (
            "(self, prompt=, sampling_params=, input_ids=, image_data=, audio_data=, video_data=, "
            "mm_hashes=, mm_content_hashes=, return_logprob=, logprob_start_len=, "
            "top_logprobs_num=, token_ids_logprob=, lora_path=, custom_logit_processor=, "
            "require_reasoning=, return_hidden_states=, return_routed_experts=, "
            "routed_experts_start_len=, stream=, bootstrap_host=, bootstrap_port=, "
            "bootstrap_room=, routed_dp_rank=, disagg_prefill_dp_rank=, kv_hints=, "
            "data_parallel_rank=, external_trace_header=, rid=, session_params=, priority=, "
            "session_id=, *, cache_salt=)"
        ),
        "shutdown": "(self)",
    },
    "srt.managers.tokenizer_manager.TokenizerManager": {
        "abort_request": "(self, rid=, abort_all=)",
        "get_internal_state": "(self)",
        "pause_generation": "(self, obj)",
        "continue_generation": "(self, obj)",
        "begin_weight_update": "(self, obj, request=)",
        "update_weights_from_tensor": "(self, obj, request=)",
        "end_weight_update": "(self, obj, request=)",
        "_dispatch_to_scheduler": "(self, obj)",
    },
    "srt.managers.io_struct": {
        "BaseReq": "(*, rid=, http_worker_ipc=)",
        "hook_custom_types": "(*new_types)",
        "PauseGenerationReqInput": "(*, rid=, http_worker_ipc=, mode=)",
        "ContinueGenerationReqInput": "(*, rid=, http_worker_ipc=, torch_empty_cache=)",
        "BeginWeightUpdateReqInput": "(*, rid=, http_worker_ipc=, selector=)",
        "EndWeightUpdateReqInput": "(*, rid=, http_worker_ipc=)",
        "BeginWeightUpdateReqOutput": "(*, rid=, http_worker_ipc=, success, message)",
        "UpdateWeightsFromTensorReqOutput": "(*, rid=, http_worker_ipc=, success, message)",
        "EndWeightUpdateReqOutput": "(*, rid=, http_worker_ipc=, success, message)",
        "UpdateWeightsFromTensorReqInput": (
            "(*, rid=, http_worker_ipc=, serialized_named_tensors, load_format=, flush_cache=, "
            "abort_all_requests=, weight_version=, selector=, torch_empty_cache=)"
        ),
    },
    "srt.utils.MultiprocessingSerializer": {
        "serialize": "(obj, output_str=)",
    },
    "utils": {
        "TypeBasedDispatcher": "(mapping)",
    },
    "srt.plugins.hook_registry.HookRegistry": {
        "register": "(target, hook, hook_type=, *, source=)",
    },
    "srt.managers.scheduler.Scheduler": {
        "init_request_dispatcher": "(self)",
        "record_weight_version_change": "(self, new_version)",
        "get_next_batch_to_run": "(self, running_batch, last_batch)",
        "update_running_batch": "(self, batch)",
    },
    "srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager": {
        "begin_weight_update": "(self, recv_req)",
        "update_weights_from_tensor": "(self, recv_req)",
        "end_weight_update": "(self, recv_req)",
        "record_weight_version_after_update": "(self, weight_version)",
    },
    "srt.model_executor.model_runner_components.weight_updater": {
        "_unwrap_tensor": "(tensor, tp_rank, device)",
        "LocalSerializedTensor": "(values)",
    },
    "srt.model_executor.model_runner_components.weight_updater.LocalSerializedTensor": {
        "get": "(self, rank)",
    },
    "srt.managers.schedule_batch.ScheduleBatch": {
        "is_empty": "(self)",
        "merge_batch": "(self, other)",
        "mix_with_running": "(self, running_batch)",
    },
    "srt.managers.scheduler_components.logprob_result_processor.SchedulerLogprobResultProcessor": {
        "_initialize_empty_logprob_containers": "(self, req)",
    },
    "srt.model_executor.forward_batch_info.ForwardMode": {
        "is_extend": "(self, include_draft_extend_v2=)",
        "is_extend_without_speculative": "(self)",
        "is_mixed": "(self)",
        "is_decode": "(self)",
        "is_idle": "(self)",
    },
    "srt.mem_cache.registry": {
        "register_radix_cache_backend": "(name, factory)",
        "create_unified_radix_cache": "(ctx, *, cache_class=)",
    },
    "srt.mem_cache.base_prefix_cache": {
        "InsertParams": (
            "(key=, value=, mamba_value=, c128_value=, prev_prefix_len=, swa_branching_seqlen=, "
            "chunked=, priority=, session_id=, track_adopted_ranges=, rotation_base=, *, "
            "component_evicted_seqlens=)"
        ),
        "InsertResult": (
            "(prefix_len, total_len=, last_device_node=, mamba_exist=, swa_branch_inserted=, "
            "rotation_tail_declined=, inserted_host_node=, host_insert_dropped=, adopted_ranges=, "
            "cache_actions=)"
        ),
        "MatchPrefixParams": "(key, cow_mamba=, req=)",
    },
    "srt.mem_cache.radix_cache": {
        "RadixKey": "(token_ids, extra_key=, is_bigram=, limit=, cache_salt=)",
    },
    "srt.mem_cache.radix_cache.RadixKey": {
        "raw_token_ids": "(self)",
    },
    "srt.mem_cache.unified_radix_cache.UnifiedRadixCache": {
        "__init__": "(self, params)",
        "reset": "(self)",
        "match_prefix": "(self, params)",
        "insert": "(self, params)",
        "insert_req": "(self, req, *, up_to, **kwargs)",
        "cache_unfinished_req": "(self, req, chunked=, **kwargs)",
        "root_node_handle": "(self, extra_key=)",
        "_evict_components": "(self, request_by_type, tracker, available_size_targets=)",
        "_evict_device_next_node": "(self, component_type, tracker)",
        "_evict_device_leaf": "(self, node_id, tracker)",
        "_component_available_size": "(self, component_type)",
        "_apply_cache_actions": "(self, actions)",
        "_all_reduce_attn_groups": "(self, tensor, op)",
    },
    "srt.mem_cache.rust_tree_core.adapter.RustUnifiedTreeCore": {
        "match_prefix": "(self, params)",
        "match_full_device_prefix": "(self, key)",
    },
    "srt.mem_cache.unified_cache.unified_tree_core.UnifiedTreeCore": {
        "match_prefix": "(self, params)",
        "match_full_device_prefix": "(self, key)",
    },
    "srt.runtime_context": {
        "get_serving": "()",
    },
    "srt.arg_groups.choices": {
        "add_attention_backend_choices": "(iterable)",
    },
    "srt.layers.attention.attention_registry": {
        "register_attention_backend": "(name)",
    },
    "srt.layers.attention.torch_native_backend.TorchNativeAttnBackend": {
        "__init__": "(self, model_runner)",
        "init_forward_metadata": "(self, forward_batch)",
        "forward_extend": "(self, q, k, v, layer, forward_batch, save_kv_cache=)",
        "forward_decode": "(self, q, k, v, layer, forward_batch, save_kv_cache=)",
    },
    "srt.utils.common": {
        "support_triton": "(backend)",
    },
    "srt.mem_cache.allocation": {
        "get_last_loc": "(req_to_token, req_pool_indices_tensor, prefix_lens_tensor)",
        "get_last_loc_torch": "(req_to_token, req_pool_indices_tensor, prefix_lens_tensor)",
        "attention_backends": "()",
    },
    "srt.mem_cache.memory_pool": {
        "KVWriteLoc": "(loc, swa_loc=, full_loc=)",
    },
    "srt.mem_cache.memory_pool.MHATokenToKVPool": {
        "set_kv_buffer": (
            "(self, layer, loc_info, cache_k, cache_v, k_scale=, v_scale=, layer_id_override=, "
            "dcp_kv_mask=)"
        ),
        "get_key_buffer": "(self, layer_id)",
        "get_value_buffer": "(self, layer_id)",
    },
    "srt.layers.sampler": {
        "register_sampler_backend": "(backend, factory)",
    },
    "srt.layers.sampler.Sampler": {
        "forward": (
            "(self, logits_output, sampling_info, return_logprob, top_logprobs_nums, "
            "token_ids_logprobs, positions)"
        ),
        "_preprocess_logits": "(self, logits, sampling_info)",
        "_sync_token_ids_across_tp": "(self, batch_next_token_ids, sampling_info)",
    },
    "srt.layers.logprob_processor.OutputLogprobProcessor": {
        "compute_logprobs": (
            "(self, logprobs, top_logprobs_nums, token_ids_logprobs, batch_next_token_ids)"
        ),
    },
    "srt.managers.schedule_batch": {
        "NextBatchPlan": "(batch_to_run, running_batch)",
    },
    "srt.observability.req_time_stats.SchedulerReqTimeStats": {
        "set_prefill_finished_time": "(self, ts=)",
    },
    "srt.layers.logprob_processor.LogprobResult": {
        "write_output_to": "(self, logits_output)",
    },
}
"""What is called, overridden or wrapped, with the arguments it takes (names.face)."""

HELD = {
    "": "__version__",
    "srt.managers.io_struct": "_USE_PICKLE_IPC",
    "srt.plugins.hook_registry.HookRegistry": "_hooks _patched",
    "srt.plugins.hook_registry.HookType": "BEFORE AFTER AROUND REPLACE",
    "srt.managers.tokenizer_manager.TokenizerManager": (
        "_result_dispatcher model_config rid_to_state"
    ),
    "srt.managers.tokenizer_manager.ReqState": "output_ids",
    "srt.configs.model_config.ModelConfig": (
        "context_len dtype hf_config is_generation is_hybrid_swa is_multimodal quantization"
    ),
    "srt.managers.scheduler.Scheduler": (
        "_request_dispatcher batch_result_processor chunked_req enable_hisparse enable_overlap "
        "require_mlp_sync tree_cache"
    ),
    "srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager": (
        "_session tp_cpu_group"
    ),
    "srt.managers.schedule_batch.NextBatchPlan": "batch_to_run running_batch",
    "srt.managers.schedule_batch.ScheduleBatch": (
        "batch_is_full chunked_req decoding_reqs extend_input_logprob_token_ids extend_lens "
        "extend_logprob_start_lens extend_num_tokens forward_mode has_grammar input_embeds "
        "is_prefill_only mix_running_indices mix_running_indices_cpu model_config out_cache_loc "
        "prefill_stats prefix_lens replace_embeds req_pool_indices req_pool_indices_cpu reqs "
        "spec_algorithm"
    ),
    "srt.managers.schedule_batch.Req": (
        "beam_group cached_tokens decode_batch_idx extend_range inflight_middle_chunks kv "
        "logprob_start_len multimodal_inputs origin_input_ids retracted_stain return_logprob rid "
        "time_stats"
    ),
    "srt.managers.schedule_batch.ReqKvInfo": "holds_kv holds_mamba",
    "srt.mem_cache.unified_radix_cache.UnifiedRadixCache": "tree_components tree_core",
    "srt.mem_cache.registry.TreeCacheBuildContext": (
        "disable_radix_cache is_hybrid_ssm is_hybrid_swa"
    ),
    "srt.arg_groups.choices": "ATTENTION_BACKEND_CHOICES",
    "srt.layers.attention.torch_native_backend.TorchNativeAttnBackend": (
        "req_to_token_pool swa_out_cache_loc token_to_kv_pool"
    ),
    "srt.layers.radix_attention.AttentionType": "DECODER",
    "srt.layers.radix_attention.RadixAttention": (
        "attn_type is_cross_attention layer_id logit_cap logit_capping_method qk_head_dim scaling "
        "sliding_window_size tp_q_head_num v_head_dim xai_temperature_len"
    ),
    "srt.mem_cache.swa_memory_pool.SWAKVPool": "full_to_swa_index_mapping layers_mapping",
    "srt.model_executor.forward_batch_info.ForwardBatch": (
        "encoder_lens extend_seq_lens forward_mode out_cache_loc req_pool_indices seq_lens"
    ),
    "srt.model_executor.model_runner.ModelRunner": "device spec_algorithm use_mla_backend",
    "srt.layers.sampler": "SGLANG_RETURN_ORIGINAL_LOGPROB",
    "srt.layers.sampler.Sampler": "output_logprob_processor rl_on_policy_target",
    "srt.layers.logits_processor.LogitsProcessorOutput": "next_token_logits next_token_logprobs",
    "srt.sampling.sampling_batch_info.SamplingBatchInfo": (
        "is_all_greedy min_ps sampling_mask_batch_indices sampling_seed temperatures top_ks top_ps"
    ),
}
"""What is read or set: attributes of modules, and of the objects of classes."""
