"""More tests of the other sandboxes, run on microVMs: those that start several machines or take seconds."""

import pytest

from sandbox.machines import create
from sandbox.test_container import (  # noqa: F401  # collected here with this module's fixtures
    test_a_fork_has_the_files_and_goes_its_own_way,
    test_a_path_that_is_swapped_while_it_is_opened_gives_nothing_of_the_target,
    test_a_snapshot_is_an_image,
    test_only_plain_files_are_read_and_no_link_is_followed,
    test_what_changed_is_an_oci_layer,
)
from sandbox.test_sdk import test_arguments_arrive_as_they_were_given, test_processes_are_limited  # noqa: F401
from sandbox.test_security import (  # noqa: F401
    test_clone3_is_absent_and_threads_work,
    test_exhaustion_stays_inside,
    test_nothing_of_the_host_can_be_read,
    test_the_filter_lets_ordinary_programs_work,
)

pytestmark = pytest.mark.slow


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
