"""Check whether a plugin can be used, for the tests of its author."""

from __future__ import annotations

from l2pd_plugins.discovery import PluginRefused, offered_policies
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.plugins import load_factory
from l2pd_plugins.policy import PolicySpec
from l2pd_plugins.testing.run import ConformanceError


def check_plugin(plugin: object) -> tuple[PolicySpec, ...]:
    """The policies that a plugin offers: its module, or the object that its entry point names.

    Each policy is imported. Raises ConformanceError, with the reason that `l2pd plugins` or the
    user of a policy would see, or if a summary still begins with TODO, as `l2pd new-policy` writes
    it.

        import my_package.plugin

        def test_the_plugin():
            assert [spec.name for spec in check_plugin(my_package.plugin)] == ["entropy_bound"]
    """
    try:
        specs = offered_policies(plugin)
        for spec in specs:
            load_factory(spec)
    except (PluginRefused, L2PDError) as error:
        raise ConformanceError(str(error)) from error
    for spec in specs:
        if spec.summary.startswith("TODO"):
            raise ConformanceError(
                f"policy {spec.name!r}: its summary is the template's, {spec.summary!r}; "
                "say in one line which positions it unmasks"
            )
    return specs
