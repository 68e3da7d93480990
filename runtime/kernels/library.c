/* Registers satchel's custom operators with an ONNX Runtime session (docs/kernels.md). */
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "helpers.h"
#include "instruction_set.h"
#include "operator.h"
#include "rate.h"
#include "trial.h"

static const Operator *operator_of(const OrtCustomOp *op) { return (const Operator *)op; }

typedef struct {
    const OrtApi *api;
    const Operator *operator;
    void *own;
    Tensor constants[]; /* one of each input, see Run */
} Kernel;

static OrtStatus *make_error(const OrtApi *api, const char *error)
{
    return ORT(api, CreateStatus)(ORT_INVALID_ARGUMENT, error ? error : "satchel: an operator failed");
}

static const char *get_name(const OrtCustomOp *op) { return operator_of(op)->name; }
static const char *get_provider(const OrtCustomOp *op) { return (void)op, "CPUExecutionProvider"; }
static size_t get_input_count(const OrtCustomOp *op) { return operator_of(op)->inputs; }
static size_t get_output_count(const OrtCustomOp *op) { return operator_of(op)->outputs; }
static OrtElementType get_input_type(const OrtCustomOp *op, size_t i) { return operator_of(op)->input_types[i]; }
static OrtElementType get_output_type(const OrtCustomOp *op, size_t i)
{
    return operator_of(op)->output_types == NULL ? ORT_FLOAT : operator_of(op)->output_types[i];
}
static int get_input_memory(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int get_start_version(const OrtCustomOp *op) { return (void)op, 1; }
static int get_end_version(const OrtCustomOp *op) { return (void)op, INT_MAX; }

static OrtCharacteristic get_input_characteristic(const OrtCustomOp *op, size_t i)
{
    return i < operator_of(op)->required ? ORT_REQUIRED : ORT_OPTIONAL;
}

static OrtCharacteristic get_output_characteristic(const OrtCustomOp *op, size_t i)
{
    return i < operator_of(op)->outputs - operator_of(op)->optional_outputs ? ORT_REQUIRED : ORT_OPTIONAL;
}

static void destroy(void *kernel)
{
    helpers_drain();
    free(((Kernel *)kernel)->own);
    free(kernel);
}

static void run_in(const Run *run, size_t tasks, size_t batches, void (*task)(void *, size_t), void *data)
{
    OrtStatus *status = ORT(run->api, KernelContext_ParallelFor)(run->context, task, tasks, batches, data);
    if (status != NULL) { /* the context has no thread pool */
        ORT(run->api, ReleaseStatus)(status);
        for (size_t i = 0; i < tasks; i++)
            task(data, i);
    }
}

static void run_tasks(void *pool, size_t tasks, void (*task)(void *, size_t), void *data)
{
    run_in(pool, tasks, tasks, task, data);
}

typedef struct {
    void (*task)(void *, size_t);
    void *data;
    size_t tasks, each; /* of a unit */
} Tasks;

static bool run_units(const void *data, size_t from, size_t end, void *results)
{
    const Tasks *tasks = data;
    (void)results;
    for (size_t i = from * tasks->each; i < end * tasks->each && i < tasks->tasks; i++)
        tasks->task(tasks->data, i);
    return true;
}

static void run_ranges(void *pool, size_t tasks, void (*task)(void *, size_t), void *data)
{
    const Run *run = pool;
    Tasks *all = helpers_begin(run->helpers, sizeof *all);
    if (all == NULL) {
        run_in(run, tasks, 0, task, data); /* 0: one batch per thread */
        return;
    }
    *all = (Tasks){task, data, tasks, (tasks + MOST_UNITS - 1) / MOST_UNITS};
    helpers_run(&(Job){.run = run_units, .data = all, .units = (tasks + all->each - 1) / all->each}, NULL);
}


bool fail(Run *run, const char *error)
{
    run->error = error;
    return false;
}

/* Returns whether a call succeeded. Replaces its message by `error` if it failed. */
static bool check(Run *run, OrtStatus *status, const char *error)
{
    if (status == NULL)
        return true;
    ORT(run->api, ReleaseStatus)(status);
    return fail(run, error);
}

static const char UNREADABLE[] = "satchel: a tensor cannot be read", TOO_DEEP[] = "satchel: a tensor has too many dimensions";

/* Reads type and dimensions through an object that ONNX Runtime allocates. */
static bool describe_by_info(Run *run, const OrtValue *value, Tensor *tensor)
{
    const OrtApi *api = run->api;
    OrtTensorInfo *info;
    if (!check(run, ORT(api, GetTensorTypeAndShape)(value, &info), UNREADABLE))
        return false;
    const bool fits = check(run, ORT(api, GetTensorElementType)(info, &tensor->type), UNREADABLE)
        && check(run, ORT(api, GetDimensionsCount)(info, &tensor->rank), UNREADABLE)
        && (tensor->rank <= MAX_RANK || fail(run, TOO_DEEP))
        && check(run, ORT(api, GetDimensions)(info, tensor->dims, tensor->rank), UNREADABLE);
    ORT(api, ReleaseTensorTypeAndShapeInfo)(info);
    return fits;
}

/* The same without: a step for one token reads about a thousand tensors. */
static bool describe_in_place(Run *run, const OrtValue *value, Tensor *tensor)
{
    const int64_t *dims;
    OrtStatus *status =
        ORT(run->api, GetTensorElementTypeAndShapeDataReference)(value, &tensor->type, &dims, &tensor->rank);
    if (!check(run, status, UNREADABLE))
        return false;
    if (tensor->rank > MAX_RANK)
        return fail(run, TOO_DEEP);
    for (size_t i = 0; i < tensor->rank; i++)
        tensor->dims[i] = dims[i];
    return true;
}

static bool has_dims_in_place; /* ONNX Runtime gives a tensor's own dimensions */

static bool describe(Run *run, const OrtValue *value, Tensor *tensor)
{
    const bool fits = has_dims_in_place ? describe_in_place(run, value, tensor) : describe_by_info(run, value, tensor);
    tensor->count = 1;
    for (size_t i = 0; fits && i < tensor->rank; i++)
        tensor->count *= tensor->dims[i];
    return fits;
}

static bool read_tensor(Run *run, const OrtValue *value, Tensor *tensor)
{
    return describe(run, value, tensor)
        && check(run, ORT(run->api, GetTensorMutableData)((OrtValue *)value, &tensor->data),
                 "satchel: an input has no data");
}

bool input(Run *run, size_t index, OrtElementType type, Tensor *tensor)
{
    const OrtValue *value = NULL;
    if (run->constants[index].data != NULL)
        *tensor = run->constants[index];
    else {
        *tensor = (Tensor){0};
        if (index >= run->inputs)
            return true;
        OrtStatus *status = ORT(run->api, KernelContext_GetInput)(run->context, index, &value);
        if (!check(run, status, "satchel: an input cannot be read"))
            return false;
        if (value == NULL)
            return true;
        if (!read_tensor(run, value, tensor))
            return false;
    }
    return type == ORT_ANY || tensor->type == type || fail(run, "satchel: an input has the wrong element type");
}

bool output_of_any_type(Run *run, size_t index, const int64_t *dims, size_t rank, void **data)
{
    const OrtApi *api = run->api;
    OrtValue *value = NULL;
    OrtStatus *status = ORT(api, KernelContext_GetOutput)(run->context, index, dims, rank, &value);
    if (!check(run, status, "satchel: the shape of an output differs from the bound buffer"))
        return false;
    if (value == NULL)
        return fail(run, "satchel: an output is missing");
    return check(run, ORT(api, GetTensorMutableData)(value, data), "satchel: an output has no data");
}

bool has_dims(const Tensor *tensor, size_t rank, const int64_t *dims)
{
    return tensor->rank == rank && memcmp(tensor->dims, dims, rank * sizeof *dims) == 0;
}

int64_t attribute(Create *create, const char *name, int64_t fallback)
{
    int64_t value;
    OrtStatus *status = ORT(create->api, KernelInfoGetAttribute_int64)(create->info, name, &value);
    if (status == NULL)
        return value;
    ORT(create->api, ReleaseStatus)(status);
    return fallback;
}

float attribute_float(Create *create, const char *name, float fallback)
{
    float value;
    OrtStatus *status = ORT(create->api, KernelInfoGetAttribute_float)(create->info, name, &value);
    if (status == NULL)
        return value;
    ORT(create->api, ReleaseStatus)(status);
    return fallback;
}

/* An input that never changes; NULL: it does, or is absent. */
static const OrtValue *constant_input(Create *create, size_t index)
{
    int constant = 0;
    const OrtValue *value = NULL;
    OrtStatus *status = ORT(create->api, KernelInfoGetConstantInput_tensor)(create->info, index, &constant, &value);
    if (status == NULL)
        return constant ? value : NULL;
    ORT(create->api, ReleaseStatus)(status);
    return NULL;
}

bool attribute_text(Create *create, const char *name, char *text, size_t size)
{
    size_t length = 0; /* queried first; includes the terminating zero */
    OrtStatus *status = ORT(create->api, KernelInfoGetAttribute_string)(create->info, name, NULL, &length);
    text[0] = 0;
    if (status != NULL) {
        ORT(create->api, ReleaseStatus)(status);
        return true;
    }
    if (length > size)
        return false;
    status = ORT(create->api, KernelInfoGetAttribute_string)(create->info, name, text, &length);
    if (status == NULL)
        return true;
    ORT(create->api, ReleaseStatus)(status);
    return false;
}

/* Describes the inputs that never change, which is then not done in each run. */
static bool keep_constants(Kernel *kernel, Create *create)
{
    Run reading = {.api = create->api};
    bool read = true;
    for (size_t i = 0; read && i < kernel->operator->inputs; i++) {
        const OrtValue *value = constant_input(create, i);
        kernel->constants[i] = (Tensor){0};
        read = value == NULL || read_tensor(&reading, value, kernel->constants + i);
    }
    create->error = reading.error;
    return read;
}

static OrtStatus *create_kernel(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **made)
{
    const Operator *operator = operator_of(op);
    Kernel *kernel = malloc(sizeof *kernel + operator->inputs * sizeof *kernel->constants);
    Create create = {api, info, NULL};
    if (kernel == NULL)
        return make_error(api, "satchel: out of memory");
    *kernel = (Kernel){api, operator, operator->create(&create)};
    if (kernel->own != NULL && keep_constants(kernel, &create)) {
        *made = kernel;
        return NULL;
    }
    free(kernel->own);
    free(kernel);
    return make_error(api, create.error);
}

static OrtStatus *compute(void *made, OrtKernelContext *context)
{
    const Kernel *kernel = made;
    const Operator *operator = kernel->operator;
    Run run = {.api = kernel->api,
               .context = context,
               .constants = kernel->constants,
               .helpers = operator->helpers,
               .parallel = {&run, run_tasks},
               .contiguous = {&run, run_ranges}};
    OrtStatus *status = ORT(run.api, KernelContext_GetInputCount)(context, &run.inputs);
    return status == NULL && !operator->run(kernel->own, &run) ? make_error(run.api, run.error) : status;
}

static OrtStatus *add(const OrtApi *api, OrtCustomOpDomain *domain, Operator *operator)
{
    operator->op = (OrtCustomOp){
        .version = ORT_API_VERSION,
        .get_name = get_name,
        .get_provider = get_provider,
        .get_input_type = get_input_type,
        .get_input_count = get_input_count,
        .get_output_type = get_output_type,
        .get_output_count = get_output_count,
        .destroy = destroy,
        .get_input_characteristic = get_input_characteristic,
        .get_output_characteristic = get_output_characteristic,
        .get_input_memory = get_input_memory,
        .create_kernel_checked = create_kernel,
        .compute_checked = compute,
        .get_start_version = get_start_version,
        .get_end_version = get_end_version,
    };
    return ORT(api, CustomOpDomain_Add)(domain, &operator->op);
}

#ifdef _WIN32
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

/* For satchel's runner: see instruction_set.h and trial.h, before the first session, and helpers.h, before it ends one. */
EXPORTED const char *satchel_announced_instruction_set(size_t index) { return announced_instruction_set(index); }
EXPORTED const char *satchel_choose_instruction_set(const char *name) { return choose_instruction_set(name); }
EXPORTED bool satchel_try_instruction_set(const char *name) { return try_instruction_set(name); }
EXPORTED void satchel_drain_helpers(void) { helpers_drain(); }

/* For satchel's planner and exporter, which have chosen an instruction set before: see rate.h and rounding.h. */
EXPORTED double satchel_products_per_second(void) { return products_per_second(); }
EXPORTED void satchel_choose_scales(const ScalesCall *call) { instructions->choose_scales(call); }
EXPORTED void satchel_round_inputs(const InputsCall *call) { instructions->round_inputs(call); }
EXPORTED void satchel_descend_inputs(const InputsCall *call) { instructions->descend_inputs(call); }

/* The threads that satchel's runner gives a session, less its own; 0 if it has not said. */
static size_t helpers_of(const OrtApi *api, const OrtSessionOptions *options)
{
    char text[16];
    size_t size = sizeof text;
    OrtStatus *status = ORT(api, GetSessionConfigEntry)(options, "satchel.helpers", text, &size);
    if (status == NULL)
        return strtoul(text, NULL, 10);
    ORT(api, ReleaseStatus)(status);
    return 0;
}

/* The domain of operators for sessions with as many helpers. It lives as long as the process. */
static OrtStatus *domain_for(const OrtApi *api, size_t helpers, OrtCustomOpDomain **domain)
{
    static OrtCustomOpDomain *domains[1 + MOST_HELPERS];
    const Operator *const each[] = {&linear_operator,         &table_linear_operator,   &attention_operator,
                              &attention_half_operator, &attention_int8_operator, &recurrence_operator,
                              &convolution_operator,    &positions_operator,      &last_token_operator,
                              &all_reduce_operator,     &all_gather_operator,     &gather_logits_operator,
                              &rounded_gather_operator, &send_operator,           &receive_operator};
    enum { OPERATORS = sizeof each / sizeof *each };
    if (domains[helpers] == NULL) {
        OrtCustomOpDomain *made;
        Operator *operators = malloc(OPERATORS * sizeof *operators);
        OrtStatus *status = operators == NULL ? make_error(api, "satchel: out of memory")
                                              : ORT(api, CreateCustomOpDomain)("satchel", &made);
        for (size_t i = 0; status == NULL && i < OPERATORS; i++) {
            operators[i] = *each[i];
            operators[i].helpers = helpers;
            status = add(api, made, operators + i);
        }
        if (status != NULL)
            return status;
        domains[helpers] = made;
    }
    *domain = domains[helpers];
    return NULL;
}

enum { FIRST_WITH_DIMS_IN_PLACE = 24 };

/* Of ONNX Runtime 1.x; 0 if its version does not read so. */
static unsigned long minor_version(const char *version)
{
    return strncmp(version, "1.", 2) == 0 ? strtoul(version + 2, NULL, 10) : 0;
}

/* The entry point that ONNX Runtime calls in a custom operator library. */
EXPORTED OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base)
{
    static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;
    const OrtApi *api = base->get_api(ORT_API_VERSION);
    if (api == NULL) { /* an older ONNX Runtime: report it through the first version of the interface */
        const OrtApi *oldest = base->get_api(1);
        return oldest == NULL ? NULL
                              : make_error(oldest, "satchel: this ONNX Runtime is too old for satchel's kernels");
    }
    if (instructions == NULL && choose_instruction_set(NULL) == NULL)
        return make_error(api, "satchel: this processor has none of the instruction sets of satchel's kernels");
    const size_t helpers = helpers_of(api, options);
    OrtCustomOpDomain *domain;
    pthread_mutex_lock(&making);
    has_dims_in_place = minor_version(base->get_version()) >= FIRST_WITH_DIMS_IN_PLACE;
    OrtStatus *status = domain_for(api, helpers <= MOST_HELPERS ? helpers : 0, &domain);
    pthread_mutex_unlock(&making);
    return status == NULL ? ORT(api, AddCustomOpDomain)(options, domain) : status;
}
