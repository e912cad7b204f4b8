{{/* Names, labels and images that several templates share. */}}

{{- define "nemo-rl.fullname" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "nemo-rl.selector" -}}
app.kubernetes.io/name: nemo-rl-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "nemo-rl.labels" -}}
{{ include "nemo-rl.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: nemo-rl
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* The image of a section of values: repository, and tag or digest. Call with (dict "image" ... "root" $). */}}
{{- define "nemo-rl.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end -}}
{{- end -}}

{{- define "nemo-rl.serviceAccount" -}}
{{- default (include "nemo-rl.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{/* Name of cluster-scoped objects: two releases of one name may live in different namespaces. */}}
{{- define "nemo-rl.clusterName" -}}
{{- $name := include "nemo-rl.fullname" . -}}
{{- if eq $name .Release.Namespace -}}{{ $name }}{{- else -}}{{ printf "%s:%s" .Release.Namespace $name }}{{- end -}}
{{- end -}}

{{- define "nemo-rl.testNamespace" -}}
{{- default (default .Release.Namespace (first .Values.watchNamespaces)) .Values.tests.namespace -}}
{{- end -}}

{{/* Security of all containers here: what the Pod Security level "restricted" asks, and a read-only root. */}}
{{- define "nemo-rl.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "nemo-rl.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "nemo-rl.viewRules" -}}
- apiGroups: [nemo-rl.io]
  resources: [rltrainingjobs, rltrainingjobs/status]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [pods, pods/log, configmaps, persistentvolumeclaims, events]
  verbs: [get, list, watch]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch]
{{- end -}}

{{/* What the operator calls, and no more: it reads no Secrets, has no pods/exec, and makes but Jobs, pods and what they need. */}}
{{- define "nemo-rl.rules" -}}
- apiGroups: [nemo-rl.io]
  resources: [rltrainingjobs]
  verbs: [get, list, watch, delete] # delete: ttlSecondsAfterFinished
- apiGroups: [nemo-rl.io]
  resources: [rltrainingjobs/status]
  verbs: [patch]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
- apiGroups: [apps]
  resources: [statefulsets]
  verbs: [get, create, patch, delete] # one for each job with rollout replicas
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete] # create, delete: the pod that serves a job's output
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, create] # list: a job's bundles, by their label
- apiGroups: [""]
  resources: [persistentvolumeclaims, services]
  verbs: [get, create]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [create] # one for each job
- apiGroups: [""]
  resources: [secrets]
  verbs: [create] # random tokens for each job of several nodes or with rollout replicas, never read back
- apiGroups: [""]
  resources: [events]
  verbs: [list, create]
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [get, list, watch, create, delete]
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads/status]
  verbs: [patch]
- apiGroups: [kueue.x-k8s.io]
  resources: [localqueues]
  verbs: [get] # whether the namespace has one that is called default
{{- end -}}

{{- define "nemo-rl.testLabels" -}}
labels: {{- include "nemo-rl.labels" . | nindent 2 }}
  app.kubernetes.io/component: test
{{- end -}}

{{/* CEL: whether `var` is one of `names`, where an entry that ends in * stands for all that begin so. */}}
{{- define "nemo-rl.oneOf" -}}
{{- $var := .var -}}
{{- $checks := list -}}
{{- range .names -}}
{{- if hasSuffix "*" . -}}
{{- $checks = append $checks (printf "%s.startsWith('%s')" $var (trimSuffix "*" .)) -}}
{{- else -}}
{{- $checks = append $checks (printf "%s == '%s'" $var .) -}}
{{- end -}}
{{- end -}}
({{ default (list "false") $checks | join " || " }})
{{- end -}}

{{/* What a refusal says of a list of names. */}}
{{- define "nemo-rl.allowed" -}}
this cluster allows {{ if .names }}{{ join ", " .names }}{{ else }}none{{ end }} (admissionPolicy.{{ .value }} of the chart)
{{- end -}}

{{/* What reaches the pods of a job beside each other, and where they may connect to: the operator makes a policy for each job. */}}
{{- define "nemo-rl.network" -}}
{{- $operator := dict "podSelector" (dict "matchLabels" (include "nemo-rl.selector" . | fromYaml)) "namespaceSelector" (dict "matchLabels" (dict "kubernetes.io/metadata.name" .Release.Namespace)) -}}
{{- $progress := list (dict "port" 8080 "protocol" "TCP") -}}
{{- $dns := list (dict "port" 53 "protocol" "UDP") (dict "port" 53 "protocol" "TCP") -}}
{{- with .Values.networkPolicy -}}
{{- $ingress := list (dict "ports" $progress "from" (concat (list $operator) .metricsFrom)) -}}
{{- $egress := list (dict "ports" $dns "to" .trainers.dns) -}}
{{- if .trainers.publicHttps -}}
{{- $closed := list "10.0.0.0/8" "172.16.0.0/12" "192.168.0.0/16" "100.64.0.0/10" "169.254.0.0/16" "127.0.0.0/8" -}}
{{- $public := list (dict "ipBlock" (dict "cidr" "0.0.0.0/0" "except" $closed)) (dict "ipBlock" (dict "cidr" "2000::/3")) -}}
{{- $egress = append $egress (dict "ports" (list (dict "port" 443 "protocol" "TCP")) "to" $public) -}}
{{- end -}}
{{- toJson (dict "ingress" $ingress "egress" (concat $egress .trainers.extraEgress)) -}}
{{- end -}}
{{- end -}}
