"""The native API does what its OpenAPI document says: requests and answers by schemathesis, in this process."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import positive_data_acceptance

from preftune.app.context import Context
from preftune.app.jobs.keys import add_key
from preftune.app.jobs.models import add_base_model
from preftune.app.jobs.platform import DEFAULT_PROJECT, Platform
from preftune.server.app import create_app
from preftune.server.native.document import document_of
from preftune.server.settings import ServerSettings
from preftune.store.artifacts import Artifacts
from preftune.store.memory import MemoryStore

EXAMPLES = 6  # of each route; tests/soak/fuzz_api.py sends thousands


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    home = tmp_path_factory.mktemp("document")
    platform = Platform(MemoryStore(), Artifacts(str(home / "artifacts")), home, Context(home / "cache", home))
    add_base_model(platform, "starter", "starter")
    _, key = add_key(platform, platform.project(DEFAULT_PROJECT).id, "test", "admin")
    app = create_app(platform, ServerSettings())
    document = document_of(app)
    # models are asked and loaded in tests of their own: here a request that happens to be right would start one
    document["paths"] = {path: one for path, one in document["paths"].items() if not path.startswith("/api/v1/serving")}
    schema = schemathesis.openapi.from_dict(document)
    schema.app = app
    return schema, {"Authorization": f"Bearer {key}", "Host": "localhost"}


def test_every_route_answers_as_its_document_says(served):
    schema, headers = served
    seen, wrong = [], []
    for found in schema.get_all_operations():
        operation = found.ok()
        seen.append(operation.label)

        @hypothesis.settings(
            max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @hypothesis.given(case=operation.as_strategy())
        def check(case):
            if case.path.endswith("/download"):
                case.query = {**(case.query or {}), "wait": 0}
            case.call_and_validate(headers=headers, excluded_checks=[positive_data_acceptance])  # names must exist

        try:
            check()
        except FailureGroup as error:  # every route is looked at, then all that was found is told
            wrong.append(f"{operation.label}: {'; '.join(str(one) for one in error.exceptions)}")
    assert not wrong, "\n".join(wrong)
    assert len(seen) > 40
    assert "POST /api/v1/jobs" in seen
