"""A microVM behaves as every other sandbox does: the tests of the others, run on one machine that came from a snapshot."""

import pytest

from sandbox.machines import create
from sandbox.test_container import (  # noqa: F401  # collected here with this module's fixtures
    test_a_fork_has_the_files_and_goes_its_own_way,
    test_a_path_that_is_swapped_while_it_is_opened_gives_nothing_of_the_target,
    test_a_pause_stops_everything_and_a_request_goes_on,
    test_a_session_is_a_terminal,
    test_a_session_over_pipes_gives_its_exit_code,
    test_a_snapshot_is_an_image,
    test_a_tree_goes_out_and_in_again_without_links,
    test_a_watcher_that_gives_up_ends_the_command,
    test_files_go_in_and_out,
    test_only_plain_files_are_read_and_no_link_is_followed,
    test_output_comes_as_it_is_written,
    test_what_changed_is_an_oci_layer,
    test_writing_never_goes_through_a_link,
)
from sandbox.test_sdk import (  # noqa: F401
    test_a_flood_is_cut_where_it_is_produced,
    test_a_stopped_child_and_zombies_are_no_obstacle,
    test_a_string_is_for_the_shell_and_a_list_is_argv,
    test_arguments_arrive_as_they_were_given,
    test_exit_codes_are_those_of_a_shell,
    test_memory_is_limited_and_told_apart,
    test_output_that_is_not_text_is_not_lost,
    test_processes_are_limited,
    test_python_runs_a_program_inside,
    test_requests_without_meaning_are_refused,
    test_stdin_environment_and_directory,
    test_the_disk_is_limited,
    test_the_time_limit_kills_the_whole_tree,
    test_what_a_command_leaves_running_ends_with_it,
)
from sandbox.test_security import (  # noqa: F401
    test_clone3_is_absent_and_threads_work,
    test_dangerous_calls_are_refused,
    test_device_nodes_and_setuid_files_do_not_work,
    test_environment_and_arguments_of_ours_are_not_there,
    test_exhaustion_stays_inside,
    test_nothing_of_the_host_can_be_read,
    test_nothing_that_matters_can_be_written,
    test_the_filter_lets_ordinary_programs_work,
    test_the_runtime_cannot_be_reached,
    test_there_is_no_right_to_anything,
    test_there_is_no_way_out_of_its_network,
)


@pytest.fixture(scope="module")
def machine():
    with create() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(machine):
    return machine


@pytest.fixture
def container(machine):
    return machine


@pytest.fixture
def fresh():
    made = []

    def start(**options):
        made.append(create(**options))
        return made[-1]

    yield start
    for one in made:
        one.close()
