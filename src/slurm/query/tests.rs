//! Texts are those of Slurm 22.05, the job lines cut after the fields that matter here.

use std::time::Instant;

use super::*;

const UNKNOWN_JOB: &str = "slurm_load_jobs error: Invalid job id specified\n";
const UNKNOWN_JOBS_STEP: &str = "slurm_get_job_steps error: Invalid job id specified\n";
const MISSING_STEP: &str = "Job step 7.0 not found\n";
const STEP: &str = "StepId=1.0 UserId=0 StartTime=2026-11-21T14:00:45 TimeLimit=UNLIMITED \
     State=RUNNING Partition=main NodeList=n1 Nodes=1 CPUs=1 Tasks=1 Name=sleep Network=(null) \
     TRES=cpu=1,mem=0,node=1 ResvPorts=(null) CPUFreqReq=Default Dist=Cyclic \
     SrunHost:Pid=n1:46\n";
const ARRAY_STEP: &str = "StepId=3_4.0 UserId=0 StartTime=2026-11-21T14:00:45 \
     TimeLimit=UNLIMITED State=RUNNING Partition=main NodeList=n2 Nodes=1 CPUs=1 Tasks=1 \
     Name=sleep Network=(null) TRES=cpu=1,mem=0,node=1 ResvPorts=(null) CPUFreqReq=Default \
     Dist=Cyclic SrunHost:Pid=n2:46\n";
const RETRYING: &str = "scontrol: error: s_p_parse_file: cannot stat file /nonexistent: No such \
     file or directory, retrying in 1sec up to 60sec\n";

/// `scontrol -o show job`: the line of one job.
fn job(id: &str, state_and_reason: &str, restarts: u64) -> String {
    format!(
        "JobId={id} JobName=b.sh UserId=root(0) GroupId=root(0) MCS_label=N/A \
         Priority=4294901759 Nice=0 Account=(null) QOS=(null) {state_and_reason} \
         Dependency=(null) Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode=0:0 \
         RunTime=00:00:02 TimeLimit=00:10:00 TimeMin=N/A SubmitTime=2026-11-21T14:00:44\n"
    )
}

#[test]
fn a_job_is_over_when_its_processes_are_gone() {
    let running = "JobState=RUNNING Reason=None";
    let completing = "JobState=COMPLETING Reason=None";
    for (name, text, restart_count, expected) in [
        ("running", job("1", running, 0), 0, Some(false)),
        ("running again, this launch", job("1", running, 1), 1, Some(false)),
        ("running again, not this launch", job("1", running, 1), 0, Some(true)),
        ("requeued", job("1", "JobState=PENDING Reason=BeginTime", 1), 0, Some(true)),
        ("held", job("1", "JobState=PENDING Reason=job_requeued_in_held_state", 2), 1, Some(true)),
        ("cancelled", job("1", "JobState=CANCELLED Reason=None", 0), 0, Some(true)),
        ("completed", job("1", "JobState=COMPLETED Reason=None", 0), 0, Some(true)),
        ("failed", job("1", "JobState=FAILED Reason=NonZeroExitCode", 0), 0, Some(true)),
        ("time is up", job("1", "JobState=TIMEOUT Reason=TimeLimit", 0), 0, Some(true)),
        ("a lost node", job("1", "JobState=NODE_FAIL Reason=NodeDown", 0), 0, Some(true)),
        ("being cancelled: it may still save its work", job("1", completing, 0), 0, Some(false)),
        ("being requeued: it may still save its work", job("1", completing, 1), 0, Some(false)),
        ("ending, two starts later", job("1", completing, 2), 0, Some(true)),
        ("suspended", job("1", "JobState=SUSPENDED Reason=None", 0), 0, Some(false)),
        ("starting", job("1", "JobState=CONFIGURING Reason=None", 0), 0, Some(false)),
        ("forgotten", UNKNOWN_JOB.into(), 0, Some(true)),
        ("another job's line", job("11", "JobState=FAILED Reason=None", 0), 0, None),
        ("no controller", RETRYING.into(), 0, None),
        ("silence", String::new(), 0, None),
        ("cut off", "JobId=1 JobName=b.sh JobSt".into(), 0, None),
    ] {
        assert_eq!(job_has_ended_in(&text, 1, restart_count), expected, "{name}");
    }
}

/// An array's last task has the array's own id, for which Slurm prints all tasks.
#[test]
fn a_task_of_an_array_is_told_from_the_others() {
    let text = job("3 ArrayJobId=3 ArrayTaskId=4", "JobState=RUNNING Reason=None", 0)
        + &job("4 ArrayJobId=3 ArrayTaskId=3", "JobState=CANCELLED Reason=None", 0);
    assert_eq!(job_has_ended_in(&text, 3, 0), Some(false));
    assert_eq!(job_has_ended_in(&text, 4, 0), Some(true));
    assert_eq!(seconds_left_in("3 6:58\n4 5:00\n", 3), Some(418));
    assert_eq!(seconds_left_in("3 6:58\n4 5:00\n", 4), Some(300));
}

#[test]
fn a_step_is_over_when_slurm_lists_it_no_more() {
    for (text, expected) in [
        (STEP, Some(false)),
        (ARRAY_STEP, Some(false)),
        (MISSING_STEP, Some(true)),
        (UNKNOWN_JOBS_STEP, Some(true)),
        (RETRYING, None),
        ("", None),
    ] {
        assert_eq!(step_has_ended_in(text), expected, "{text}");
    }
}

#[test]
fn time_left_is_read_where_there_is_a_limit() {
    for (text, expected) in [
        ("1 9:58\n", Some(598)),
        ("1 1-23:59:58\n", Some(172_798)),
        ("1 UNLIMITED\n", None),
        ("1 INVALID\n", None),
        ("11 9:58\n", None),
        (UNKNOWN_JOB, None),
        ("", None),
    ] {
        assert_eq!(seconds_left_in(text, 1), expected, "{text}");
    }
}

#[test]
fn the_configuration_names_the_cluster() {
    let config = "Configuration data as of 2026-11-21T14:01:00\nCliFilterPlugins        = (null)\n\
                  ClusterName             = farm\nCommunicationParameters = (null)\n";
    assert_eq!(cluster_name_in(config).as_deref(), Some("farm"));
    assert_eq!(cluster_name_in(RETRYING), None);
}

/// Job ids of one cluster mean nothing on another.
#[test]
fn nothing_is_known_of_a_launch_without_a_cluster() {
    assert_eq!(step_has_ended(None, 1, None, 0), None);
}

#[test]
fn commands_are_heard_on_both_streams_and_not_waited_for() {
    let shell = |limit, script| answer_within(Duration::from_millis(limit), "sh", &["-c", script]);
    assert_eq!(
        shell(10_000, "echo no job; echo why >&2; exit 1").as_deref(),
        Some("no job\nwhy\n")
    );
    assert_eq!(shell(10_000, "echo \"$SQUEUE_USERS\"").as_deref(), Some("\n"));
    let long = shell(10_000, "head -c 300000 /dev/zero").map(|text| text.len());
    assert_eq!(long, Some(300_000), "more than a pipe holds");
    assert_eq!(answer("no-such-program-of-slurm", &[]), None);
    let began = Instant::now();
    assert_eq!(shell(50, "echo trying; sleep 30"), None);
    assert!(began.elapsed() < Duration::from_secs(20), "it was not waited for");
}
