"""The rows of the table in docs/features.md, each with the test that proves it."""

import ast
import re

from builders import ROOT
from source import parse

PAGE = (ROOT / "docs" / "features.md").read_text("utf-8")
OUTSIDE = re.compile(r"pytest\.mark\.(soak|parity|skip)\b")
PROVED_BY = {
    # jRLHF
    "token_count_reward": "test_rewards.py::test_token_count_by_hand",
    "reward_model_is_saved_and_loaded": "test_model_files.py::test_reward_model_round_trip",
    "chunks_overlap": "test_shakespeare.py::test_chunks_by_hand",
    "prompts_are_padded_on_the_left": (
        "test_batches.py::test_prompts_are_left_padded_and_keep_their_columns"
    ),
    "regression_with_adamw": "test_updates.py::test_steps_by_hand_and_over_devices",
    "policy_gradient_with_a_moving_baseline": "test_policy_algorithms.py::test_vpg_by_hand",
    "response_length_and_temperature": (
        "test_sampling.py::test_a_token_is_jax_random_categorical_s_of_its_row_and_slot"
    ),
    "schedules": "test_schedules.py::test_the_rate_of_each_step",
    "early_stopping": "test_stage_loop.py::test_early_stopping_ends_a_run_and_says_so",
    "checkpoints_at_an_interval": (
        "test_stage_loop.py::test_a_run_that_is_killed_goes_on_without_a_row_twice_or_missing"
    ),
    "samples_at_validations": (
        "test_rl_validation.py::test_every_prompt_is_sampled_scored_and_shown"
    ),
    "reward_curves": (
        "test_report.py::test_every_metric_has_a_curve_and_validation_stands_with_its_training"
    ),
    "character_tokenizer": "test_tokenizers.py::test_round_trip_and_special_ids",
    "shakespeare_script": "test_shakespeare.py::test_a_generated_text_is_answered_with_h_alone",
    "shakespeare_notebooks": (
        "test_notebooks.py::test_the_two_shakespeare_notebooks_one_after_the_other"
    ),
    "wandb": (
        "test_trackers.py::test_a_run_and_its_resumption_are_one_run_in_which_no_step_comes_twice"
    ),
    # LM Human Preferences
    "four_way_labels": "test_given_labels.py::test_token_ids_become_texts",
    "published_labels_are_verified": "test_given_labels.py::test_what_is_not_the_set_is_deleted",
    "published_labels_are_decoded": "test_given_labels.py::test_token_ids_become_texts",
    "ppo": "test_known_optima.py::test_learning_from_samples_reaches_the_optimum",
    "one_command_for_all_stages": (
        "test_scripts.py::test_pipeline_hands_each_folder_on_and_passes_over_finished_stages"
    ),
    "seed": "test_wiring.py::test_streams_are_apart",
    "device": "test_scripts.py::test_a_users_mistake_is_a_sentence_and_exit_code_2",
    "checkpoints_know_where_they_come_from": "test_manifest.py::test_manifest",
    "yaml_with_lists_of_files": "test_config.py::test_values_of_every_type",
    "run_length_in_updates_or_passes": (
        "test_schedules.py::test_length_in_passes_over_the_prompts"
    ),
    "log": "test_tracking.py::test_tracker_writes_the_three_files",
    "out_of_memory": "test_out_of_memory.py::test_out_of_memory_names_what_is_held_and_what_helps",
    "supervised_fine_tuning": "test_scripts.py::test_tiny_config_serves_every_script_alone",
    "inference": (
        "test_generator.py::test_texts_log_probs_and_rewards_are_those_of_a_full_forward_pass"
    ),
    "more_metrics": "test_evaluation.py::test_pairs_by_hand",
    "rows_are_spread_over_devices": "test_training.py::test_one_device_and_four_agree",
    "llama": "test_model_files.py::test_llama_and_its_relatives_come_back_bit_equal",
    # RLHF pipeline
    "the_three_files_as_they_are": "test_formats.py::test_the_generated_corpus_is_that_of_its_seed",
    "each_stage_takes_the_folder_before": "test_docs.py::test_the_commands_of_a_page_run",
    "flags_are_mapped": (
        "test_docs.py::test_every_flag_of_the_pipeline_is_mapped_to_one_that_exists"
    ),
    "helpfulness": "test_evaluate.py::test_helpfulness_by_hand",
    "harmlessness": "test_evaluate.py::test_refusals_and_uncertainty_are_counted_by_label",
    "honesty_uncertainty": "test_evaluate.py::test_refusals_and_uncertainty_are_counted_by_label",
    "honesty_calibration": "test_evaluate.py::test_log_probabilities_and_scores_are_the_models_own",
    "preference_accuracy": "test_evaluate.py::test_preferences_by_hand",
    "agreement_with_annotators": "test_evaluate.py::test_agreement_by_hand",
    "diversity_metrics": "test_evaluate.py::test_diversity_by_hand",
    "win_rate_with_intervals": "test_evaluate.py::test_win_rate_compares_all_samples_of_a_prompt",
    "categories_of_ones_own": "test_evaluate.py::test_everything_from_the_command_line",
    "evaluation_is_a_command": "test_evaluate.py::test_everything_from_the_command_line",
    "evaluation_is_deterministic": (
        "test_evaluate.py::test_what_is_not_given_is_named_and_changes_nothing_else"
    ),
    "reward_hacking_is_detected": "test_alerts.py::test_the_threshold_of_a_default_rule",
    "kl_penalty_fixed": (
        "test_rewards.py::test_kl_shaped_equals_a_loop_whatever_is_in_masked_columns"
    ),
    "kl_penalty_adaptive": "test_iteration.py::test_kl_coefficient_follows_the_kl",
    "kl_hard_stop": "test_alerts.py::test_a_stop_saves_and_holds_until_the_rule_is_changed",
    "safety_filter_of_prompts": (
        "test_safety.py::test_prompts_are_dropped_replaced_or_counted_where_they_stand"
    ),
    "safety_filter_of_responses": "test_safety.py::test_what_becomes_of_an_unsafe_row",
    "alert_rules_from_yaml": "test_alerts.py::test_rules_on_the_command_line_and_in_yaml",
    "default_alerts": "test_alerts.py::test_the_threshold_of_a_default_rule",
    "alert_stops_with_exit_code_3": (
        "test_alerts.py::test_a_stop_saves_and_holds_until_the_rule_is_changed"
    ),
    "alerts_are_shown": "test_alerts.py::test_the_page_lists_alerts_and_marks_them",
    "live_metrics": "test_tracking.py::test_lines_where_there_is_no_terminal",
    "before_and_after": "test_report.py::test_the_page_of_one_run",
    "curves_as_png": "test_png.py::test_the_files_of_a_run",
    "trackio_by_the_same_path": (
        "test_trackers.py::test_a_service_that_joins_later_gets_what_was_before"
    ),
    "tensorboard": "test_trackers.py::test_tensorboard_reads_each_step_once",
    "service_that_fails_stops_nothing": (
        "test_trackers.py::test_errors_are_one_warning_and_stop_nothing"
    ),
    "gradient_checkpointing": "test_models.py::test_remat_is_applied",
    "mixed_precision": "test_models.py::test_bfloat16_compute_keeps_float32_parameters_and_logits",
    "lora": "test_lora_runs.py::test_a_run_saves_the_merged_model_and_its_adapters",
    "reward_of_ones_own": "test_reward_functions.py::test_a_sum_of_traced_terms_and_a_function",
    "ensembles_by_a_list_of_paths": "test_reward_functions.py::test_what_entries_mean",
    "entropy_coefficient": "test_algorithm_losses.py::test_loss_metrics_and_gradient_equal_a_loop",
    "length_penalty": "test_reward_functions.py::test_what_entries_mean",
    "diversity_reward": "test_rewards.py::test_diversity_by_hand",
    "reward_scaling": "test_reward_functions.py::test_a_traced_reward_on_the_host",
    "troubleshooting_page": "test_docs.py::test_troubleshooting_turns_settings_that_exist",
    "deployment": (
        "test_model_files.py::test_round_trip_is_bit_equal_and_named_as_gpt2_lm_head_model"
    ),
    # The reward-model notebook
    "preferences_are_loaded_and_preprocessed": "test_batches.py::test_comparison_batch_by_hand",
    "reward_model_on_llama_with_lora": (
        "test_notebooks.py::test_the_notebook_of_the_reward_model_on_llama_tells_good_from_bad"
    ),
    "one_scalar_for_each_response": "test_heads.py::test_scores_by_hand",
    "good_is_told_from_bad": "test_known_optima.py::test_reward_model_recovers_the_rewards",
    "a_notebook_of_it": (
        "test_notebooks.py::test_the_notebook_of_the_reward_model_on_llama_tells_good_from_bad"
    ),
}


def runs(test):
    """Whether there is a function ``FILE.py::NAME`` in tests/ that CI runs."""
    file, name = test.split("::")
    is_run = False
    for node in parse((ROOT / "tests" / file).read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            if OUTSIDE.search(ast.unparse(node.value)):
                return False
        elif isinstance(node, ast.FunctionDef) and node.name == name:
            marks = map(ast.unparse, node.decorator_list)
            lines = map(ast.unparse, node.body)
            is_run = not any(map(OUTSIDE.match, marks))
            is_run = is_run and not any(line.startswith("pytest.skip") for line in lines)
    return is_run


def test_what_proves_a_row_runs_in_the_fast_or_the_slow_tests():
    assert [test for test in sorted(set(PROVED_BY.values())) if not runs(test)] == []


def test_the_feature_table_names_these_rows():
    [table] = re.findall(r"^\|.*\| proved by \|\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    rows = []
    for line in table.splitlines():
        rows += re.findall(r"`(\w+)`", line.rstrip("| ").rpartition(" | ")[2])
    assert sorted(rows) == sorted(PROVED_BY)
