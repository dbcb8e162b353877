"""Names that several processes agree on."""

__all__ = ["AGENT", "ROLLOUT", "STOP_FILE"]

#: The CPU's `actor_rollout_ref.rollout.name` and `.agent.default_agent_loop`.
ROLLOUT, AGENT = "hf_cpu", "bupo_keyed"
#: Whoever writes this file into a run's directory lets the run end after its step.
STOP_FILE = "stop"
