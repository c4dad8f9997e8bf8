"The public face: what `from fasterai.distill.all import *` brings, name by name"

WANTED = """
KnowledgeDistillationCallback get_model_layers get_module_by_name match_feature_layers
Teacher Renormalize resize_batch TeacherCache Replay record RecordedTeacher plan_recording check_recording
describe_recording merge_recordings
SoftTarget Logits Mutual DecoupledKD NKD HardTarget DIST TTM WTTM BinaryKD Ranking standardize
Attention FitNet ActivationBoundaries Similarity CWD ChannelStats NST
RKDDistance RKDAngle RKD PKT CC IRG VID CRD ReviewKD OFD available_losses catalogue recipe_of
Schedule lin cos one_shot iterative agp one_cycle dsd sched_oneshot sched_iterative sched_agp sched_onecycle sched_dsd
available_schedules
Study Experiment sweep compare suggest_weights
EMA Peers StudentSees RLD Cosine Affinity ClassMates VirtualTeacher NoTask Projected several ConfidentTeachers
DeepMutualLearning MutualLearning OnlineDistillation SelfDistillation DeepSupervision ZeroShot ramp_up sched_ramp_up
knn_accuracy linear_probe probe_head Oneself pretrained_teacher born_again assistants which_teacher mix_unlabelled
pseudo_labels noisy_student Consistency StrongView fixmatch GeneralizedDistillation TokenDistillation
TokenKD keep_layers
Relations ViTKD AttentionScores HiddenStates HiddenCosine split_qkv
quantize_aware FreezeQuantizers validate_int8 search_student
export_student check_file OnnxFile Predictor
LwF ICaRL LessForget PooledOutput grow_head Remember OneHotBCE align_head Exemplars nearest_mean Attack Discriminator
dream data_free_learner DataFreeDistillation adapt Entropy PKD IFVD CIRKD
detection_dls detector_learner detect should_i_distil
plot_compare plot_attention plot_similarity plot_soft_targets save_report
""".split()


def test_it_brings_what_users_type_and_nothing_else():
    got = {}
    exec('from fasterai.distill.all import *', got)
    got = {n for n in got if n!='__builtins__'}
    assert got==set(WANTED), got ^ set(WANTED)
    assert len(WANTED)==len(set(WANTED))
