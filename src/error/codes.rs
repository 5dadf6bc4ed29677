//! Every error code, with its HTTP statuses and what it means.
//!
//! Owns the words of `docs/errors.md`. Never makes an error. The thing to know: `tests/tidy.rs`
//! holds each code in the source against its row here, so a code without a row fails a test.

/// One code. No status: it only ever stops a command or a start.
#[derive(Debug, Clone, Copy)]
pub struct Code {
    pub code: &'static str,
    pub statuses: &'static [u16],
    /// One or two sentences: what happened, and what to do where that is not plain.
    pub meaning: &'static str,
}

/// Codes that belong together, under one heading.
pub struct Group {
    pub title: &'static str,
    pub codes: &'static [Code],
}

/// Whether the table has this code.
pub fn known(code: &str) -> bool {
    GROUPS.iter().any(|g| g.codes.iter().any(|c| c.code == code))
}

macro_rules! codes {
    ($($title:literal { $($code:ident [$($status:literal)*] $meaning:literal)* })*) => {
        &[$(Group {
            title: $title,
            codes: &[$(Code {
                code: stringify!($code),
                statuses: &[$($status),*],
                meaning: $meaning,
            },)*],
        },)*]
    };
}

/// The table, in the order of the page.
pub const GROUPS: &[Group] = codes! {
    "Who may ask" {
        invalid_api_key [401] "No key was sent, or it is unknown, revoked or past its end."
        insufficient_scope [403]
            "The key is good, but not for this route: its scopes do not include the one named."
        name_not_allowed [403]
            "The key may use this adapter but not change it, or may not create a name like this."
        host_not_allowed [403]
            "A server without keys was asked under a host name that is not its own. See \
             `allow_hosts`."
        origin_not_allowed [403]
            "A web page of another origin sent the request. See `allow_origins`."
        missing_host [400] "The request has no `Host` header, and a server without keys needs one."
    }
    "The request" {
        unknown_route [404] "There is no such path."
        method_not_allowed [405]
            "The path exists, but not with this method. `Allow` lists the methods."
        unsupported_media_type [415]
            "The body is not declared as what the route takes, mostly `application/json`."
        invalid_json [400]
            "The body is not JSON, or not JSON that may be nested or sized like this."
        incomplete_body [400] "The body ended before it was complete."
        body_timeout [408]
            "The body stalled for `body_seconds_max`, or came slower than 4 KiB a second. The \
             connection closes."
        body_too_large [413]
            "The body is larger than 4 MiB, 16 bytes for each token of the context, or a sixteenth \
             of `request_bytes_max`; or it holds too many values or fields."
        missing_parameter [400] "A required field is missing; `param` names it."
        unknown_parameter [400] "A field that the server does not know; `param` names it."
        invalid_type [400] "A field has the wrong JSON type; `param` names it."
        invalid_value [400] "A field has a value outside its range; `param` names it."
        unsupported_parameter [400]
            "A known field that would change the answer and that this version does not honour."
        unsupported_content [400] "A message has a content part that is not text."
        unsupported_content_part [400] "The chat template cannot show a content part of this type."
    }
    "Prompts and models" {
        model_not_found [404]
            "No model, adapter, version or alias of this name, or none that the key may see."
        empty_prompt [400] "The prompt has no tokens."
        context_length_exceeded [400]
            "Prompt and answer together need more tokens than the context has."
        no_chat_template [400]
            "Neither the base model nor the adapter has a chat template; use `/v1/completions`."
        chat_template_error [400]
            "The chat template failed on this conversation; the message is the template's."
        unsupported_chat_template [400]
            "The chat template uses what this version does not have. The base's stops the start."
        tokenizer_error [400] "The text cannot be encoded, or the tokens cannot be decoded."
        invalid_weight [400] "A weight in a sum of adapters is not a finite number."
        duplicate_adapter [400] "A sum names an adapter twice, or two adapters of the same content."
        too_many_adapters [400] "A sum has more parts than 8."
        inexact_merge [400]
            "LoRAX's merge strategies other than `cat` do not compute the sum of the adapters."
        not_composable [422] "An adapter with DoRA or replaced norms is served alone only."
        adapter_deleted [404]
            "The adapter was deleted while the request ran, and its `drain_seconds` are over."
    }
    "Limits and load" {
        rate_limit_exceeded [429]
            "Requests or tokens of this minute, or requests at once, are used up. \
             See `Retry-After`."
        quota_exceeded [429] "The tokens of this day or month are used up. See `Retry-After`."
        request_exceeds_limit [400]
            "The request needs more tokens than its key may ever use in a minute."
        queue_full [429]
            "The queue has no place for the request, or none for this tenant. See `Retry-After`."
        queue_timeout [429] "The request waited `queue_seconds_max` for its first step."
        request_memory_exhausted [429]
            "Requests that are not queued yet hold `request_bytes_max`, or the tenant its \
             share of it."
        engine_busy [429] "The engine has more commands waiting than it takes."
        uploads_busy [429]
            "Four uploads are being received, or as many as the tenant may send."
        too_many_connections [429]
            "This address has `connections_per_address_max` connections, all at requests."
        connections_exhausted [503] "All `connections_max` connections are at requests."
        request_timeout [503]
            "The request took longer than `request_seconds_max`. Repeating it will not help."
        stream_too_slow [503] "The client read its stream too slowly; only this stream ends."
        shutting_down [503] "The server is shutting down and takes no new requests."
        usage_backlogged [503]
            "Usage records cannot be written fast enough, so no request is taken that would \
             need one."
        engine_unavailable [503] "The engine has stopped."
        insufficient_capacity [507]
            "All resident adapters were in use for half of `queue_seconds_max`, or the adapter \
             can never fit."
    }
    "Adapters, versions and aliases" {
        adapter_not_found [404]
            "No adapter, version or alias of this name, or none that the key may see."
        adapter_ineffective [409]
            "The probe saw no change in the logits. Upload with `?force=true` if that is meant."
        invalid_name [400] "The name has characters or a length that names must not have."
        name_taken [409] "An alias or an adapter has this name already; they share their names."
        adapter_aliased [409]
            "An alias of the same owner, or of an operator, leads to it. Change that first."
        nothing_to_roll_back [409] "No earlier version, or no earlier weights, are kept."
        version_conflict [412]
            "The name is not at the version that `If-Match` or `expected_version` says."
        invalid_alias [400] "The weights name no version, or are out of range."
        adapter_limit_reached [507] "As many names as `adapters_max` are kept."
        tenant_share_exceeded [507]
            "The tenant's share of names, disk or memory is used up, or what its key allows."
        storage_full [507]
            "The disk is full, read-only or broken. Nothing was changed. See `Retry-After`."
        disk_nearly_full [507] "The upload would take the room that is kept for the databases."
        corrupt_adapter [500] "A stored file no longer has the digest that it was stored under."
    }
    "The form of an upload" {
        invalid_archive [400] "The archive cannot be read."
        archive_link_not_allowed [400] "The archive holds a link."
        archive_path_not_allowed [400] "The archive holds a path that leads elsewhere."
        ambiguous_upload [400] "The archive holds several adapters, or files at several levels."
        duplicate_file [400] "The same file is in the upload twice."
        upload_too_large [413] "The upload is larger than `upload_bytes_max`."
        missing_file [422] "A file that an adapter needs is not there."
        ambiguous_adapter [422] "Both PEFT and GGUF files are there."
        not_a_regular_file [422] "A file of the adapter is a link, a directory or a device."
        pickle_not_allowed [422]
            "A pickle can run code when it is read; save the adapter as safetensors."
        invalid_safetensors [422] "The weights' file breaks a rule of the format."
        invalid_gguf [422] "The GGUF file breaks a rule of the format."
    }
    "What an adapter holds" {
        invalid_adapter_config [422]
            "`adapter_config.json` cannot be read, or a value in it cannot be."
        unsupported_config_field [422]
            "A field that would change the result and that this version does not serve."
        unsupported_peft_type [422] "A PEFT method other than LoRA."
        unsupported_modules_to_save [422] "Whole modules are replaced; only norm weights may be."
        unsupported_dtype [422] "The factors are stored in a type that is not served."
        architecture_mismatch [422] "The GGUF adapter was made for another model family."
        base_mismatch [422]
            "The adapters to merge were trained on different bases."
        base_weights_changed [422]
            "Training changed the base weights too (PiSSA and its kin); convert the adapter first."
        rank_out_of_range [422]
            "A rank, or the sum of the ranks of a composition, is not between 1 and 512."
        layer_out_of_range [422] "The adapter names a layer that the base does not have."
        target_not_found [422] "`target_modules` names a module that no tensor is for."
        unknown_tensor [422] "A tensor that belongs to no module of the base."
        duplicate_tensor [422] "A tensor occurs twice."
        missing_factor [422] "One of the two factors of a module is missing."
        shape_mismatch [422] "A tensor has another shape than the base or the rank demand."
        non_finite_values [422] "The weights hold NaN or infinity."
        non_finite_logits [422 500]
            "The adapter makes the model produce NaN: at its probe (422) or in a request (500)."
        empty_adapter [422] "The adapter changes nothing at all."
        invalid_chat_template [422]
            "The adapter's chat template does not compile, or fails on the sample conversations."
        invalid_tokenizer_config [422]
            "`tokenizer_config.json` cannot be read, or a value in it cannot be."
        tokenizer_mismatch [422]
            "The adapter's tokenizer has tokens that the base lacks or numbers differently."
        invalid_generation_config [422]
            "`generation_config.json` cannot be read, or a value in it cannot be."
        unsupported_generation_field [422]
            "A generation default that would change answers and is not served."
    }
    "Merges" {
        invalid_merge [400]
            "The order cannot be carried out; `param` names the option or the source."
        not_mergeable [422] "DoRA, biases and replaced norms are no product of two factors."
        ranks_differ [422] "The method works on the factors and needs equal ranks."
        not_a_family [422] "The sources share neither all A nor all B."
        merge_not_found [404] "No merge of this id, or none that the key may see."
        merge_over [409] "The merge is too far on to be cancelled."
        merge_report_missing [409] "The report is not made yet, or never will be."
        merge_queue_full [429] "Sixteen jobs wait or run, or as many as the tenant may have."
        merges_busy [429] "Too many compatibility reports are being computed."
        merge_source_gone [409] "After a restart, a source of the merge is no longer there."
        merge_abandoned [500] "The server ended under this merge more than ten times."
    }
    "Training data" {
        invalid_training_file [400]
            "Lines of the file are not training data; the message has the first twenty by number."
    }
    "Files" {
        file_not_found [404] "No file of this id, or none that the key may see."
        file_in_use [409]
            "A job uses the file, or what was trained on it; it can be deleted when that is over."
        file_too_large [413] "The file is larger than 512 MiB, or a part of one than 64 MiB."
        file_limit_reached [507] "Ten thousand files are kept; delete one first."
        unsupported_purpose [400]
            "Nothing here uses a file with this purpose; `fine-tune` is the one to send."
        upload_not_found [404]
            "No upload in parts of this id, or none that the key may see, or its hour is over."
        upload_over [409]
            "The upload is completed or cancelled already, or being put together."
        upload_mismatch [400]
            "The parts do not come to the bytes, or the MD5, that were said; `param` names which."
        upload_limit_reached [429] "Sixty-four uploads in parts are not over."
    }
    "Training" {
        fine_tuning_job_not_found [404]
            "No training job of this id, or none that the key may see."
        fine_tuning_job_over [409]
            "The training job is over, paused already, not paused, or being published."
        fine_tuning_report_missing [409] "The training job has no report yet, or never will."
        fine_tuning_queue_full [429]
            "Sixteen jobs wait or run, or as many as the tenant may have."
        fine_tuning_source_gone [409]
            "After a restart, a version or a file that the job trains on is no longer there."
        fine_tuning_abandoned [500] "The server ended under this training job more than ten times."
        unsupported_method [400] "A training method other than `supervised` and `dpo`."
        model_not_trainable [400]
            "The adapter brought a chat template, which training does not render."
        training_disabled [503] "The server does not train: its `train_bytes` is 0."
        training_memory_exhausted [507]
            "A training job needs more memory than half of `train_bytes`; the message has both."
        incompatible_start [422]
            "A job cannot go on from this adapter: the message names the rank, the scale, the \
             module or the part in which it differs from what the job trains."
        non_finite_loss [422]
            "The loss or its gradient was not finite in three steps in a row; nothing was updated \
             in them. A smaller learning rate may help."
    }
    "Keys" {
        key_not_found [404] "No key of this id."
        key_revoked [409] "The key is revoked and cannot be changed."
        operator_key_missing [409]
            "The first key must be an operator's without end, or nobody could make another."
        key_limit_reached [507] "No more keys can be kept."
    }
    "The server's own faults" {
        internal_error [500] "A fault of the server; its log has the reason under the request's id."
        step_failed [500] "A step of the engine failed; its requests end, the server goes on."
    }
    "Start and command line" {
        invalid_arguments [] "The command line cannot be read (exit code 2)."
        invalid_config []
            "A setting cannot be; the message names file, line, key and what was expected \
             (exit code 2)."
        no_cache_directory [] "There is no directory to keep models in; set `POLYLORA_CACHE`."
        invalid_model [] "The checkpoint cannot be read."
        unsupported_model [] "A model family, quantisation or RoPE scaling that is not served."
        unsupported_tokenizer [] "The tokenizer's decoder is of a kind that is not served."
        context_too_long [] "`context` is longer than the model's own."
        insufficient_memory [] "The memory that the settings ask for is not there."
        kv_memory_too_small [] "`kv_bytes` does not hold even one sequence."
        data_dir_locked [] "Another process uses the data directory."
        data_dir_unsupported [] "A later version wrote the data directory, or parts of it."
        data_dir_other_base [] "The data directory belongs to another base model."
        port_unavailable [] "The address cannot be listened on."
        refused [] "A client command was refused by the server; the message is the server's."
        unsupported_reference [] "`polylora verify` has no reference for this model."
        invalid_adapter [] "`polylora verify` wants a PEFT directory."
    }
};
