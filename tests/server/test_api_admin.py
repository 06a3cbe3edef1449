"""/admin: dead letters, pools and workers, for those who may."""

import asyncio
from pathlib import Path

from server.api.app import create_app
from server.protocol import JobError, new_job_id
from server.queue.jobs import JobQueue
from tests.server.fake_worker import service
from tests.server.keyed import keyed

ROUTES = [
    ("GET", "/admin/dead"), ("GET", "/admin/dead/{id}"), ("POST", "/admin/dead/{id}/retry"),
    ("POST", "/admin/dead/retry"), ("DELETE", "/admin/dead/{id}"), ("DELETE", "/admin/dead"),
    ("GET", "/admin/pools"), ("GET", "/admin/workers"),
]  # fmt: skip


async def bury(queue: JobQueue, client) -> str:  # type: ignore[no-untyped-def]
    """A job of `client` that used up its attempts."""
    answer = await client.post(
        "/generate", json={"prompt": "a secret wish"}, headers={"prefer": "respond-async"}
    )
    job_id: str = answer.json()["id"]
    (claim,) = await queue.claim("w1", "default", 1, 1e12)
    assert claim.job_id == job_id
    assert await queue.fail(claim, JobError(code="boom", detail="It broke."), retry=True)
    return job_id


def test_dead_letters_over_http(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        settings = {"max_attempts": 1}
        async with keyed(redis_url, tmp_path, settings=settings, worker=False) as it:
            key, client = await it.member()
            _, admin = await it.member(scopes=("admin",))
            await it.publish()
            dead = [await bury(it.queue, client) for _ in range(3)]
            listed = (await admin.get("/admin/dead", params={"limit": 2})).json()
            assert (listed["count"], [job["id"] for job in listed["jobs"]]) == (3, dead[:0:-1])
            assert listed["jobs"][0]["tenant"] == key.tenant
            assert listed["jobs"][0]["error"] == {"code": "boom", "detail": "It broke."}
            assert "a secret wish" not in str(listed)
            shown = (await admin.get(f"/admin/dead/{dead[0]}")).json()
            assert shown["spec"]["prompt"] == "a secret wish"
            retried = (await admin.post(f"/admin/dead/{dead[0]}/retry")).json()
            again = await it.queue.get(retried["retried"][dead[0]])
            assert again is not None
            assert (again.retry_of, again.tenant) == (dead[0], key.tenant)
            gone = (await admin.delete(f"/admin/dead/{dead[1]}")).json()
            assert gone == {"purged": 1, "remaining": 1}
            for method, path in (("GET", ""), ("POST", "/retry"), ("DELETE", "")):
                answer = await admin.request(method, f"/admin/dead/{dead[1]}{path}")
                assert (answer.status_code, answer.json()["code"]) == (404, "not-found")
            assert list((await admin.post("/admin/dead/retry")).json()["retried"]) == [dead[2]]
            assert (await admin.delete("/admin/dead")).json() == {"purged": 0, "remaining": 0}

    asyncio.run(scenario())


def test_pools_and_workers(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with keyed(redis_url, tmp_path) as it:
            _, admin = await it.member(scopes=("admin",))
            async with asyncio.timeout(10):
                while not (workers := (await admin.get("/admin/workers")).json()):
                    await asyncio.sleep(0.02)
            assert [(worker["id"], worker["running"]) for worker in workers] == [("fake-1", 0)]
            (pool,) = (await admin.get("/admin/pools")).json()
            assert (pool["name"], pool["model"], pool["queued"]) == ("default", "demo", 0)
            assert [worker["id"] for worker in pool["workers"]] == ["fake-1"]

    asyncio.run(scenario())


def test_each_scope_opens_its_own_and_no_more(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with keyed(redis_url, tmp_path, worker=False) as it:
            _, client = await it.member()
            _, admin = await it.member(scopes=("admin",))
            paths = create_app(it.app.state.context.settings, it.queue).openapi()["paths"]
            told = {(method.upper(), path.replace("{job_id}", "{id}"))
                    for path, methods in paths.items() for method in methods
                    if path.startswith("/admin")}  # fmt: skip
            assert told == set(ROUTES)
            for method, path in ROUTES:
                answer = await client.request(method, path.format(id=new_job_id()))
                assert (answer.status_code, answer.json()["code"]) == (403, "missing-scope"), path
            for method, path in (("POST", "/generate"), ("GET", "/presets")):
                answer = await admin.request(method, path, json={"prompt": "x"})
                assert (answer.status_code, answer.json()["code"]) == (403, "missing-scope")
            assert (await admin.get("/usage")).status_code == 200

    asyncio.run(scenario())


def test_without_keys_only_the_machines_own_users_administer(
    redis_url: str, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False, loopback_only=True) as it:
            assert (await it.client.get("/admin/dead")).json() == {"count": 0, "jobs": []}
        async with service(redis_url, tmp_path, worker=False) as it:  # as with --insecure
            answer = await it.client.get("/admin/dead")
            assert (answer.status_code, answer.json()["code"]) == (403, "missing-scope")
            assert "lumina dead" in answer.json()["detail"]

    asyncio.run(scenario())
